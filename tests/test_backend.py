"""kernels/backend.py: the best that can serve is chosen, the others say why not, and a missing one that is asked for is an error."""
import pytest

from kernels.backend import Backend, MissingBackend, choose

TABLE = {"op": (
    Backend("fast", "fastest", lambda device: "no GPU", "pip install fast"),
    Backend("good", "good", lambda device: None),
    Backend("plain", "always works", lambda device: None),
)}


def test_auto_takes_the_first_that_can_serve():
    choice = choose("op", table=TABLE)
    assert (choice.op, choice.backend, choice.reason) == ("op", "good", "good")
    assert choice.alternatives == (("fast", "no GPU"), ("plain", "can serve, but good is preferred"))


def test_one_by_name():
    choice = choose("op", "plain", table=TABLE)
    assert choice.backend == "plain" and dict(choice.alternatives)["good"] == "can serve, but plain was asked for"


def test_missing_is_an_error_with_the_install_line():
    with pytest.raises(MissingBackend, match="no GPU.*pip install fast") as error:
        choose("op", "fast", table=TABLE)
    assert (error.value.op, error.value.backend, error.value.install) == ("op", "fast", "pip install fast")
    with pytest.raises(MissingBackend, match="there are: fast, good, plain"):
        choose("op", "faster", table=TABLE)
    with pytest.raises(MissingBackend, match="fast: no GPU"):
        choose("op", table={"op": TABLE["op"][:1]})


def test_the_projects_adamw():
    assert choose("adamw").backend == "torch"
