"""Rules of `log`: where figures may be published. No torch. They belong to the rules of `validate.py`, which says what a rule is."""
import re
from collections.abc import Iterator

from megatron_ext.config.schema import Config
from megatron_ext.errors import UserError

_ADDRESS = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.%]+)\]|(?P<host>[A-Za-z0-9.-]+)):(?P<port>\d{1,5})")


def parse_address(text: str, key: str = "log.prometheus_listen") -> tuple[str, int]:
    """"HOST:PORT" -> (host, port); an IPv6 address stands in brackets, port 0 is the system's choice. Raises UserError."""
    found = _ADDRESS.fullmatch(text)
    if found is None or int(found["port"]) > 65535:
        raise UserError(key, text, "must be HOST:PORT, such as 127.0.0.1:9400, or [::1]:9400; 0.0.0.0 is every network of the machine")
    return found["v6"] or found["host"], int(found["port"])


def figures_can_be_published(config: Config) -> Iterator[UserError]:
    listen = config.log.prometheus_listen
    if listen is not None:
        try:
            parse_address(listen)
        except UserError as error:
            yield error
