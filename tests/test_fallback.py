"""A damaged newest checkpoint under checkpoint.load=auto: set aside and told of; never where it was named, or is the only one."""
import hashlib
import json
from pathlib import Path

import pytest
from small import records

from megatron_ext.checkpoint import manifest
from megatron_ext.errors import UserError
from megatron_ext.train import fallback
from megatron_ext.train.fallback import undamaged


def make(run: Path, step: int, *, version: int = manifest.VERSION) -> Path:
    """A checkpoint without tensors, written by the rule at the top of manifest.py."""
    path, common = run / "checkpoints" / f"step_{step:08d}", b"{}"
    path.mkdir(parents=True)
    (path / "common.json").write_bytes(common)
    entry = {"size": len(common), "sha256": hashlib.sha256(common).hexdigest()}
    fields = {"format": manifest.FORMAT, "version": version, "written": float(step), "record": {"step": step}, "files": {"common.json": entry}}
    (path / "manifest.json").write_bytes(manifest.seal(fields))
    return path


def take(source):
    if source is not None:
        manifest.verify(source)
    return source


def flip(file: Path, byte: int) -> None:
    content = bytearray(file.read_bytes())
    content[byte] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("file", ["manifest.json", "common.json"])
@pytest.mark.parametrize("cut", [True, False])
def test_the_one_before_is_taken_and_nothing_is_deleted(tmp_path, capfd, file, cut):
    good, bad = make(tmp_path, 4), make(tmp_path, 8)
    if cut:
        (bad / file).write_bytes((bad / file).read_bytes()[:-1])
    else:
        flip(bad / file, 0)
    content = (bad / file).read_bytes()
    assert undamaged("auto", tmp_path, take) == good
    aside = good.with_name("step_00000008.damaged")
    assert (aside / file).read_bytes() == content and not bad.exists()
    (event,) = records(tmp_path, "events")
    assert (event["kind"], event["checkpoint"], event["set_aside"]) == ("checkpoint_damaged", str(bad), str(aside))
    assert file in event["reason"] and f"it is now {aside}" in capfd.readouterr().err
    flip(make(tmp_path, 8) / "common.json", 0)
    assert undamaged("auto", tmp_path, take) == good and good.with_name("step_00000008.damaged-2").is_dir()


def test_every_bit_of_a_manifest_counts(tmp_path):
    path = make(tmp_path, 4)
    content = (path / "manifest.json").read_bytes()
    for position in range(len(content)):
        flip(path / "manifest.json", position)
        with pytest.raises(manifest.Damaged):
            manifest.read_manifest(path)
        (path / "manifest.json").write_bytes(content)


def test_what_is_named_or_alone_is_refused_and_stays(tmp_path):
    first, second = make(tmp_path, 4), make(tmp_path, 8)
    flip(second / "common.json", 0)
    with pytest.raises(manifest.Damaged, match="newest other checkpoint is .*step_00000004"):
        undamaged(str(second), tmp_path, take)
    assert second.is_dir()
    flip(first / "common.json", 0)
    for _ in range(2):  # also when it is asked again
        with pytest.raises(manifest.Damaged, match="step_00000004"):
            undamaged("auto", tmp_path, take)
    assert first.is_dir()


def test_a_rank_that_sees_the_other_ones_renaming_goes_along(tmp_path, monkeypatch):
    """Rank 1 of two: rank 0 has renamed the damaged one, and one is left, before this rank looks."""
    good, bad = make(tmp_path, 4), make(tmp_path, 8)

    class Second(fallback.Ranks):
        rank, size = 1, 2

        def __init__(self):
            self.first = [(bad, None), (False, None), (good, None)]  # what rank 0 says: which one, that another is left, which one

        def gather(self, value):
            return [None if value is None else self.first.pop(0), value]

        def close(self):
            pass

    def take(source):
        if source == bad:
            manifest.set_aside(bad)
            raise manifest.Damaged(manifest.KEY, bad, "damaged")
        return source

    monkeypatch.setattr(fallback, "Ranks", Second)
    assert undamaged("auto", tmp_path, take) == good


def test_another_version_and_other_refusals_are_no_damage(tmp_path):
    make(tmp_path, 4)
    newer = make(tmp_path, 8, version=manifest.VERSION + 1)
    with pytest.raises(UserError, match="format version") as found:
        undamaged("auto", tmp_path, take)
    assert type(found.value) is UserError and newer.is_dir()


def test_where_there_is_nothing(tmp_path):
    assert undamaged("auto", tmp_path, take) is None and undamaged(None, tmp_path, take) is None
    assert json.dumps(records(tmp_path, "events")) == "[]"


def test_a_checkpoint_that_is_removed_while_one_looks_is_none(tmp_path, monkeypatch):
    kept, removed = make(tmp_path, 8), make(tmp_path, 4)
    written = manifest._written

    def slow(path):
        if path == removed:
            (removed / "manifest.json").unlink()
        return written(path)

    monkeypatch.setattr(manifest, "_written", slow)
    assert manifest.steps(tmp_path / "checkpoints") == [kept]
