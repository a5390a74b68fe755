"""Documents with their images as WebDataset shards: plain tar files, which `webdataset` and megatron-energon read. A sample of a document:

    5b0c....json     text, id and metadata, as a line of the shards has them
    5b0c....0.png    its first image, 1.jpg the second, ...: the numbers are those of `metadata.images`

An image whose content the source does not hold (a page's link) has no file. The same documents give the same bytes.
"""
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

from datatrove.pipeline.base import PipelineStep

from megatron_ext.curate.documents import canonical, read_records, shard_name, write_json
from megatron_ext.curate.ingest.parts import ENDINGS
from megatron_ext.data.prepared import file_sha256
from megatron_ext.files import whole


class TarWriter(PipelineStep):
    """Shard `rank` of `shards` as a tar file in `folder`. `pictures`: content of images, by their sha256."""

    type, name = "curate", "webdataset"

    def __init__(self, shards: Path, pictures: Path, folder: Path, counts: Path):
        super().__init__()
        self._shards, self._pictures, self._folder, self._counts = shards, pictures, folder, counts

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> Iterator:
        path = self._folder / f"{rank:06d}.tar"
        documents = images = 0
        with whole(path) as stream, tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for record in read_records(self._shards / shard_name(rank)):
                documents += 1
                _add(archive, f"{record['id']}.json", canonical(record))
                for number, image in enumerate(record["metadata"].get("images", ())):
                    digest, ending = image.get("sha256"), ENDINGS.get(image.get("media_type"))
                    if digest and ending and (picture := self._pictures / digest[:2] / digest).exists():
                        images += 1
                        _add(archive, f"{record['id']}.{number}.{ending}", picture.read_bytes())
        write_json(self._counts / f"{rank:06d}.json", {"name": path.name, "documents": documents, "images": images, "bytes": path.stat().st_size,
                                                       "sha256": file_sha256(path)})
        yield from ()


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), 0o644
    archive.addfile(entry, io.BytesIO(content))
