"""Frequencies of rotary positions (Su et al. 2021, arXiv 2104.09864), and how Llama 3.1 stretches them for contexts longer than it was trained on."""
import math

import torch
from torch import Tensor

from megatron_ext.config.schema import ModelConfig


def scaled(frequencies: Tensor, model: ModelConfig) -> Tensor:
    """The frequencies [d / 2] fp32 of a model with `rope_scaling_factor`: unchanged where a turn takes few tokens, divided by the factor where it takes
    many, in between a mean of the two weighted by how many turns fit into the original context (Llama 3.1's published code, `apply_scaling`)."""
    turns = model.rope_original_length * frequencies / (2 * math.pi)
    low, high = model.rope_low_freq_factor, model.rope_high_freq_factor
    weight = ((turns - low) / (high - low)).clamp(0, 1)
    return torch.lerp(frequencies / model.rope_scaling_factor, frequencies, weight)
