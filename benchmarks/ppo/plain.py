"""GPT-2 in plain PyTorch, as short and as fast as it can be written for training on packed or padded rows: the ceiling's model.

x + W_o attention(W_qkv norm(x)), x + W_2 gelu(W_1 norm(x)), with torch's own linear layers, layer norm, tanh-GELU and
scaled_dot_product_attention. No dropout. Weights in the names and layout of `weights.gpt2` (transformers'), with linear layers as [out, in].
"""
import torch.nn.functional as F
from torch import Tensor, nn
from weights import Shape


class Layer(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        h = shape.hidden
        self.heads = shape.heads
        self.ln_1, self.ln_2 = nn.LayerNorm(h), nn.LayerNorm(h)
        self.c_attn, self.attn_proj = nn.Linear(h, 3 * h), nn.Linear(h, h)
        self.c_fc, self.mlp_proj = nn.Linear(h, 4 * h), nn.Linear(4 * h, h)

    def forward(self, x: Tensor) -> Tensor:
        """[rows, seq, hidden] -> the same."""
        rows, length, width = x.shape
        q, k, v = self.c_attn(self.ln_1(x)).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(rows, length, width)
        x = x + self.attn_proj(attended)
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class Backbone(nn.Module):
    """tokens [rows, seq] -> the last norm's output [rows, seq, hidden]."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(shape.words, shape.hidden), nn.Embedding(shape.positions, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.ln_f = nn.LayerNorm(shape.hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.ln_f(x)


NAMES = {"attn.c_attn": "c_attn", "attn.c_proj": "attn_proj", "mlp.c_fc": "c_fc", "mlp.c_proj": "mlp_proj", "ln_1": "ln_1", "ln_2": "ln_2"}


def backbone(shape: Shape, state: dict[str, Tensor]) -> Backbone:
    """With the weights of `weights.gpt2`."""
    made = Backbone(shape)
    own = {name: state[f"transformer.{name}"] for name in ("wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias")}
    for layer in range(shape.layers):
        for theirs, ours in NAMES.items():
            for part in ("weight", "bias"):
                value = state[f"transformer.h.{layer}.{theirs}.{part}"]
                own[f"layers.{layer}.{ours}.{part}"] = value.t().contiguous() if value.dim() == 2 else value
    made.load_state_dict(own)
    return made
