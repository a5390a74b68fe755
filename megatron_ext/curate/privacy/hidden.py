"""What the files of a build tell of documents that personal data was taken out of: neither a file's name nor a hash gives it back.

A plain hash can be tried out: what is left of a document says all of it but the number that was taken out, there are 10^8 numbers of mobile phones, and a machine
hashes as many texts in a minute. So where `privacy` is among the steps:

    with a key (that of pseudonyms)   ids and hashes are HMACs of the plain ones: the same document has the same, and who has the key can look for it
    without one                       both hashes are those of the cleaned text; where personal data was in the origin, the id is of the cleaned origin and text;
                                      what was dropped before it was cleaned has no hash, and the hash of the input is over names and sizes

Names of files (set_aside.jsonl, messages) and what the catalogue says of a source are cleaned too. A build's working folder has the names of the input's files as
they are, since its tasks have to open them (OUTPUT.work/tasks/); it goes when the build ends.
"""
from collections.abc import Collection
from functools import lru_cache

from megatron_ext.curate.documents import document_id, text_sha256
from megatron_ext.curate.privacy.config import PrivacyConfig
from megatron_ext.curate.privacy.replace import Key
from megatron_ext.errors import UserError

NOTHING = "0" * 64  # in the place of a hash


class Hidden:
    """Args: steps: of the build; without `privacy` all is told as it is.

    Attributes:
        on: whether anything is hidden. blind: without a key.
    """

    def __init__(self, steps: Collection[str], settings: PrivacyConfig):
        self.on = "privacy" in steps
        self._settings, self._key = settings, Key.found(settings) if self.on else None
        self.blind = self.on and self._key is None
        self._name = lru_cache(maxsize=4096)(self._cleaned_name)

    def digest(self, plain: str) -> str:
        """In the place of a hash of what was not cleaned (64 hexadecimal digits)."""
        return NOTHING if self.blind else plain if self._key is None else self._key.digest(plain)

    def identity(self, plain: str) -> str:
        """In the place of an id (32 hexadecimal digits)."""
        return plain if self._key is None else self._key.digest(plain)[:32]

    def name(self, text: str) -> str:
        """A file's name, or a text of the catalogue, without personal data."""
        return self._name(text) if self.on else text

    def place(self, path: str, position: str, number: int) -> tuple[str, str, int]:
        """(path, position, number) to be shown of a file; its number in the order of names is told where the name is not."""
        shown = self.name(path), self.name(position)
        return *shown, 0 if shown == (path, position) else number

    def cleaned(self, text: str) -> str:
        """A text as `privacy` would leave it; as it is where that cannot be told (kiwipiepy is missing)."""
        try:
            cleaner = self._cleaner()
        except UserError:
            return text
        return cleaner.clean(text).text

    def settle(self, document: object) -> None:
        """Without a key, behind `privacy`: gives a document the hashes and the id that may be told."""
        metadata = document.metadata
        metadata["sha256"] = metadata["text_sha256"] = digest = text_sha256(document.text)
        path, _, position = metadata["origin"].partition("#")
        if document.id != document_id(metadata["source"], path, position):
            document.id = document_id(metadata["source"], metadata["origin"], digest)

    def _cleaned_name(self, text: str) -> str:
        cleaner = self._cleaner()
        try:
            return cleaner.clean_name(text)
        except Exception:  # noqa: BLE001 its message and its frames hold the name
            return "[HIDDEN]"

    def _cleaner(self):
        from megatron_ext.curate.blocks import opened

        return opened("privacy", self._settings).cleaner
