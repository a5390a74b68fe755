"""The lines of hook.sh, for scripts that are rendered: `python -m megatron_ext.contact.hook` prints them."""
import sys
from importlib.resources import files


def text() -> str:
    return files("megatron_ext.contact").joinpath("hook.sh").read_text(encoding="utf-8")


if __name__ == "__main__":
    sys.stdout.write(text())
