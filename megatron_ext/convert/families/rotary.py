"""Rotary positions in `config.json`: `rope_theta` and `rope_scaling` as everybody wrote them, `rope_parameters` as transformers 5 does."""
import math

from megatron_ext.config.schema import ModelConfig
from megatron_ext.convert.settings import Settings

THETA = 10000.0


def read(settings: Settings, *, base_key: str = "rope_theta") -> tuple[dict[str, object], dict]:
    """(fields of `ModelConfig`, what else the file says of rotary positions). Raises UserError for a scaling that we do not compute."""
    key = "rope_parameters" if settings.get("rope_parameters") else "rope_scaling"
    scaling = settings.get(key) or {}
    if not isinstance(scaling, dict):
        raise settings.wrong(key, scaling, "must be a table of settings")
    inner = Settings(scaling)
    kind = inner.get("rope_type") or inner.get("type") or "default"
    inner.ignore("type")
    base = inner.number("rope_theta", settings.number(base_key, THETA))
    found: dict[str, object] = {"position_embedding": "rope", "rotary_base": base}
    if kind == "llama3":
        found |= {
            "rope_scaling_factor": inner.number("factor", 8.0), "rope_low_freq_factor": inner.number("low_freq_factor", 1.0),
            "rope_high_freq_factor": inner.number("high_freq_factor", 4.0),
            "rope_original_length": inner.whole("original_max_position_embeddings", 8192),
        }
    elif kind != "default":
        raise settings.wrong(f"{key}.rope_type", kind, "is not supported; default and llama3 are")
    rest = {name: value for name, value in scaling.items() if name not in ("rope_type", "type", "rope_theta", "factor", "low_freq_factor",
                                                                          "high_freq_factor", "original_max_position_embeddings")}
    for name in rest.keys() - {"partial_rotary_factor"}:
        raise settings.wrong(f"{key}.{name}", rest[name], "is not known")
    return found, rest


def percent(rotated: int, width: int) -> float:
    """`rotary_percent` of a head of a width, so that percent x width is the whole number `rotated` again, which floats do not promise."""
    found = rotated / width
    while int(width * found) < rotated:
        found = math.nextafter(found, 2.0)
    return found


def written(model: ModelConfig) -> dict[str, object]:
    """`rope_theta` and `rope_scaling`, which every version of transformers, vLLM and llama.cpp's converter reads."""
    found: dict[str, object] = {"rope_theta": model.rotary_base, "rope_scaling": None}
    if model.rope_scaling_factor is not None:
        found["rope_scaling"] = {
            "rope_type": "llama3", "factor": model.rope_scaling_factor, "low_freq_factor": model.rope_low_freq_factor,
            "high_freq_factor": model.rope_high_freq_factor, "original_max_position_embeddings": model.rope_original_length,
        }
    return found
