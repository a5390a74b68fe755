"""What a family of models is: how its `config.json` reads as our configuration and the other way, and which of its tensors are which of ours."""
import re
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, replace

from megatron_ext.config.schema import ModelConfig
from megatron_ext.convert.forms import SAME, Heads, Same, Shape
from megatron_ext.convert.ours import ENCODER, LAYERS, Ours, tensors
from megatron_ext.convert.settings import Settings


@dataclass(frozen=True)
class Line:
    """One of our tensors and the tensors of theirs that it is made of.

    Attributes:
        ours: its key; of a layer without `decoder.layers.` (an encoder-decoder's encoder keeps `encoder.layers.`), which `theirs` names as {layer}.
        theirs: their names without the family's prefix.
        form: how the one becomes the other.
    """

    ours: str
    theirs: tuple[str, ...]
    form: Same = SAME

    @classmethod
    def of(cls, ours: str, *theirs: str, form: Same = SAME) -> "Line":
        return cls(ours, theirs, form)


def norm(ours: str, theirs: str) -> tuple[Line, Line]:
    """The gain of a norm, and its bias where it has one."""
    return tuple(Line.of(f"{ours}.{kind}", f"{theirs}.{kind}") for kind in ("weight", "bias"))


def linear(ours: str, *theirs: str, form: Same = SAME, bias: Same | None = None) -> tuple[Line, Line]:
    """A weight, and a bias where it has one. `bias`: its form where that is another."""
    return (Line.of(f"{ours}.weight", *(f"{name}.weight" for name in theirs), form=form),
            Line.of(f"{ours}.bias", *(f"{name}.bias" for name in theirs), form=bias or form))


@dataclass(frozen=True)
class Placed:
    """A line for one layer (None: outside the layers), with whole names and shapes."""

    ours: Ours
    layer: int | None
    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    form: Same


@dataclass(frozen=True)
class Family:
    """A family.

    Attributes:
        name: its `model_type`; architecture: transformers' class of it.
        prefix: of its tensors' names but those of the module that the head lies in; directories without it exist.
        lines: its tensors, or what gives those of a model. A line counts where our model has the tensor.
        reads: their settings as our configuration. Raises UserError for what we do not compute.
        writes: our configuration (and the number of words) as their settings; what it cannot say shows when it is read back.
        buffers: patterns of tensors that old files hold and no model needs.
        head: the name of the head's weight; files of tied models may hold a copy of the words under it.
        licence: of the family's published weights where the directory says nothing.
        formerly: ends of names today, and what they were in old files.
    """

    name: str
    architecture: str
    prefix: str
    lines: tuple[Line, ...] | Callable[[ModelConfig], tuple[Line, ...]]
    reads: Callable[[Settings], ModelConfig]
    writes: Callable[[ModelConfig, int], dict]
    buffers: tuple[str, ...] = ()
    head: str = "lm_head.weight"
    licence: str | None = None
    formerly: tuple[tuple[str, str], ...] = ()

    def named(self, one: Placed, present: Container[str]) -> Placed:
        """`one` under the names that a directory has: today's, or where one is not there the old one."""
        def found(name: str) -> str:
            old = (name.removesuffix(now) + was for now, was in self.formerly if name.endswith(now) and name not in present)
            return next((former for former in old if former in present), name)

        return replace(one, names=tuple(map(found, one.names)))

    def placed(self, model: ModelConfig, vocab: int, prefix: str) -> Iterator[Placed]:
        """Every tensor of a model in the order of the computation, with the names that it has under a prefix. Raises ValueError for a tensor of
        ours that the family has no name for."""
        lines = {line.ours: line for line in (self.lines(model) if callable(self.lines) else self.lines)}
        own, heads, outside = tensors(model, vocab), Heads.of(model), self.head.partition(".")[0] + "."

        def place(one: Ours, layer: int | None) -> Placed:
            line = lines.get(one.key.removeprefix(LAYERS))
            if line is None:
                raise ValueError(f"{self.name} has no tensor for {one.key}")
            names = tuple((name if name.startswith(outside) else prefix + name).format(layer=layer) for name in line.theirs)
            return Placed(one, layer, names, tuple(line.form.shapes(one.shape, heads)), line.form)

        stacked = [one for one in own.values() if one.stacked]
        yield from (place(one, None) for one in own.values() if not one.stacked and not one.last)
        for start in (ENCODER, LAYERS):
            part = [one for one in stacked if one.key.startswith(start)]
            for layer in range(part[0].layers(model) if part else 0):
                yield from (place(one, layer) for one in part)
        yield from (place(one, None) for one in own.values() if one.last)

    def is_buffer(self, name: str) -> bool:
        return any(re.fullmatch(rf"(.*\.)?{pattern}", name) for pattern in self.buffers)

    def prefix_of(self, names: Iterable[str]) -> str:
        """The prefix that a directory's tensors have: the family's, or what is left of it where the outer classes were not saved."""
        names, parts = list(names), self.prefix.split(".")
        tails = [".".join(parts[number:]) for number in range(len(parts))]
        return next(tail for tail in tails if any(name.startswith(tail) for name in names) or not tail)
