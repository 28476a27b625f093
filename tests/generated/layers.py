"""Layers of drawn modules, as rows of source text; each maps `h` to a tensor of the same width and rank."""

from __future__ import annotations

from dataclasses import dataclass

FUNCTIONS = {
    "Through": """class Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.clamp(-1, 1)
    @staticmethod
    def backward(ctx, g): return g""",
    "Reverse": """class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.view_as(x)
    @staticmethod
    def backward(ctx, g): return -g""",
    "FrozenNorm": """class FrozenNorm(nn.BatchNorm1d):
    def train(self, mode=True): return super().train(False)""",
    "KeptDropout": """class KeptDropout(nn.Dropout):
    def train(self, mode=True): return super().train(False)""",
    "triple": "def triple(module, args, output): return output * 3",
    "shift": "def shift(module, args): return (args[0] + 1,)",
    "scaled": "def scaled(module, grads, outer): return (grads[0] * 0.5,)",
    "halved": "def halved(grad): return grad * 0.5",
}
IMPORTS = {
    "Conv1D": "from transformers.pytorch_utils import Conv1D",
    "BaseModelOutput": "from transformers.modeling_outputs import BaseModelOutput",
    "checkpoint": "from torch.utils.checkpoint import checkpoint",
    "parametrizations": "from torch.nn.utils import parametrizations",
}


@dataclass(frozen=True)
class Kind:
    """A row: what `__init__` and `forward` say. `_N` stands for a number, `DD` for twice the width, `D` for the width.

    Attributes:
        init: statements of `__init__`, one a line.
        forward: statements of `forward`, one a line.
        ranks: how many axes `h` may have.
        resizes: whether `h` changes its size, so that no sum can be made with what it was.
        weight: how often it is drawn.
    """

    init: str
    forward: str
    ranks: str = "234"
    resizes: bool = False
    weight: int = 2


_L = "self.l_N = nn.Linear(D, D)"
_AB = "self.a_N = nn.Linear(D, D)\nself.b_N = nn.Linear(D, D)"
_QKV = "self.q_N = nn.Linear(D, D)\nself.k_N = nn.Linear(D, D)\nself.v_N = nn.Linear(D, D)"
_FLAT = "h = self.n_N(h.reshape(-1, D)).reshape(h.shape)"

KINDS: dict[str, Kind] = {
    # layers, branches and residuals
    "linear": Kind(_L, "h = self.l_N(h)", weight=6),
    "no bias": Kind("self.l_N = nn.Linear(D, D, bias=False)", "h = self.l_N(h).tanh()", weight=3),
    "mlp": Kind(
        "self.u_N = nn.Linear(D, DD)\nself.d_N = nn.Linear(DD, D)", "h = self.d_N(F.gelu(self.u_N(h)))", weight=4
    ),
    "gated": Kind(
        "self.u_N = nn.Linear(D, DD)\nself.d_N = nn.Linear(D, D)",
        "u, g = self.u_N(h).chunk(2, -1)\nh = self.d_N(u * g.sigmoid())",
    ),
    "Conv1D": Kind("self.u_N = Conv1D(DD, D)\nself.d_N = Conv1D(D, DD)", "h = self.d_N(self.u_N(h).relu())"),
    "residual": Kind(_AB, "h = h + self.b_N(F.silu(self.a_N(h)))", weight=4),
    "branches": Kind(_AB, "h = self.a_N(h) * self.b_N(h).sigmoid()", weight=4),
    "branch of a branch": Kind(_AB, "t = self.a_N(h).tanh()\nh = self.b_N(t) + t * h"),
    "experts": Kind(
        "self.g_N = nn.Linear(D, 3)\nself.e_N = nn.ModuleList([nn.Linear(D, D) for _ in range(3)])",
        "g = self.g_N(h).softmax(-1)\nh = sum(g[..., i : i + 1] * e(h) for i, e in enumerate(self.e_N))",
    ),
    "dictionary": Kind(
        'self.m_N = nn.ModuleDict({"in": nn.Linear(D, D), "out": nn.Linear(D, D)})',
        'h = self.m_N["out"](self.m_N["in"](h).relu())',
    ),
    # shared and tied
    "twice": Kind(_L, "h = self.l_N(self.l_N(h))"),
    "twice around an activation": Kind(_L, "h = self.l_N(F.gelu(self.l_N(h)))"),
    "twice in branches": Kind(_L, "h = self.l_N(h) * self.l_N(h * 0.5).sigmoid()"),
    "loop": Kind(_L, "for _ in range(3):\n    h = h + self.l_N(h).tanh()"),
    "crossed": Kind(_AB, "h = self.b_N(self.a_N(h)) + self.a_N(self.b_N(h))"),
    "tied": Kind(_AB + "\nself.b_N.weight = self.a_N.weight", "h = self.b_N(self.a_N(h).relu())"),
    # in place
    "relu_": Kind(_L, "h = self.l_N(h)\nh.relu_()"),
    "in-place modules": Kind(
        "self.s_N = nn.Sequential(nn.Linear(D, D), nn.ReLU(inplace=True), nn.Linear(D, D), nn.SiLU(inplace=True))",
        "h = self.s_N(h)",
        weight=3,
    ),
    "+=": Kind(_L, "y = self.l_N(h)\ny += h\nh = y"),
    "+= of the input": Kind(_AB, "t = self.a_N(h)\nt += 1\nh = self.b_N(t) + t"),
    "setitem": Kind(_L, "h = self.l_N(h)\nh[..., 0] = 0\nh[:, -1:] *= 0.5"),
    "setitem of a layer": Kind(_AB, "y = self.a_N(h)\ny[..., : D // 2] = self.b_N(h)[..., : D // 2]\nh = y"),
    "in place on a slice": Kind(_L, "h = self.l_N(h)\nh[..., 3].add_(1)\nh.mul_(0.5)"),
    "in place between readers": Kind(
        _AB, "t = self.a_N(h).tanh()\nu = self.b_N(t)\nt = t.clone().mul_(2)\nh = u + self.b_N(t)"
    ),
    # hooks and gradients of the module's own
    "forward hook": Kind(_L + "\nself.l_N.register_forward_hook(triple)", "h = self.l_N(h)", weight=1),
    "hook of an activation": Kind("self.t_N = nn.Tanh()\nself.t_N.register_forward_hook(triple)", "h = self.t_N(h)"),
    "forward pre-hook": Kind(_L + "\nself.l_N.register_forward_pre_hook(shift)", "h = self.l_N(h)", weight=1),
    "backward hook": Kind(_L + "\nself.l_N.register_full_backward_hook(scaled)", "h = self.l_N(h)", weight=1),
    "tensor hook": Kind(_L, "h = self.l_N(h)\nif h.requires_grad:\n    h.register_hook(halved)", weight=1),
    "straight-through": Kind(_L, "h = Through.apply(self.l_N(h))", weight=1),
    "reversal": Kind(_AB, "h = self.a_N(h) + self.b_N(Reverse.apply(h))", weight=1),
    "no_grad": Kind(_AB, "with torch.no_grad():\n    t = self.a_N(h)\nh = self.b_N(h) * t.sigmoid()"),
    "detach": Kind(_AB, "h = self.a_N(h) + self.b_N(h.detach())"),
    "checkpoint": Kind(_L, "h = checkpoint(self.l_N, h, use_reentrant=False)", weight=1),
    # parameters and buffers of its own
    "F.linear": Kind(
        "self.w_N = nn.Parameter(torch.randn(D, D) / 4)\nself.c_N = nn.Parameter(torch.randn(D))",
        "h = F.linear(h, self.w_N, self.c_N)",
    ),
    "F.linear twice": Kind(
        "self.w_N = nn.Parameter(torch.randn(D, D) / 4)", "h = F.linear(F.linear(h, self.w_N).tanh(), self.w_N)"
    ),
    "x @ w.T": Kind("self.w_N = nn.Parameter(torch.randn(D, D) / 4)", "h = h @ self.w_N.T"),
    "einsum": Kind("self.w_N = nn.Parameter(torch.randn(D, D) / 4)", 'h = torch.einsum("...d,de->...e", h, self.w_N)'),
    "bmm": Kind(
        "self.w_N = nn.Parameter(torch.randn(D, D) / 4)", "h = torch.bmm(h, self.w_N.expand(h.shape[0], D, D))", "3"
    ),
    "scale": Kind("self.w_N = nn.Parameter(torch.rand(D) + 0.5)", "h = h * self.w_N + 0.1"),
    "a layer's weight": Kind(_L, "h = self.l_N(h) + h @ self.l_N.weight", weight=1),
    "counter": Kind(
        'self.register_buffer("n_N", torch.zeros(()))\n' + _L, "self.n_N.add_(1)\nh = self.l_N(h)", weight=1
    ),
    "running mean": Kind(
        'self.register_buffer("m_N", torch.zeros(D))',
        "if self.training:\n    self.m_N.lerp_(h.detach().reshape(-1, D).mean(0), 0.1)\nh = h - self.m_N",
        weight=1,
    ),
    "buffer": Kind('self.register_buffer("m_N", torch.linspace(-1, 1, D))', "h = h + self.m_N"),
    "table": Kind("self.t_N = nn.Parameter(torch.randn(48, D))", "h = h + self.t_N[: h.shape[1]]", "3"),
    "weight_norm": Kind("self.l_N = parametrizations.weight_norm(nn.Linear(D, D))", "h = self.l_N(h)", weight=1),
    # norms and dropout
    "LayerNorm": Kind("self.n_N = nn.LayerNorm(D)", "h = self.n_N(h)", weight=3),
    "RMSNorm": Kind("self.n_N = nn.RMSNorm(D)", "h = self.n_N(h)"),
    "GroupNorm": Kind("self.n_N = nn.GroupNorm(4, D)", "h = self.n_N(h.transpose(1, -1)).transpose(1, -1)"),
    "BatchNorm": Kind("self.n_N = nn.BatchNorm1d(D)", _FLAT, weight=3),
    "BatchNorm of all steps": Kind("self.n_N = nn.BatchNorm1d(D, momentum=None)", _FLAT, weight=1),
    "BatchNorm twice": Kind("self.n_N = nn.BatchNorm1d(D)\n" + _L, _FLAT + "\nh = self.l_N(h)\n" + _FLAT, weight=1),
    "FrozenNorm": Kind("self.n_N = FrozenNorm(D)\nself.n_N.running_mean += 1", _FLAT, weight=1),
    "Dropout": Kind("self.d_N = nn.Dropout(0.0)", "h = self.d_N(h)"),
    "KeptDropout": Kind("self.d_N = KeptDropout(0.5)", "h = self.d_N(h)", weight=1),
    # sequences
    "LSTM": Kind("self.r_N = nn.LSTM(D, D, batch_first=True)", "h = self.r_N(h)[0]", "3"),
    "GRU": Kind("self.r_N = nn.GRU(D, D // 2, 2, batch_first=True, bidirectional=True)", "h = self.r_N(h)[0]", "3"),
    "GRU, steps first": Kind(
        "self.r_N = nn.GRU(D, D)", "h = self.r_N(h.transpose(0, 1))[0].transpose(0, 1)", "3", weight=1
    ),
    "last state": Kind("self.r_N = nn.LSTM(D, D, batch_first=True)", "h = h + self.r_N(h)[1][0][-1][:, None]", "3"),
    "convolution": Kind(
        "self.c_N = nn.Conv1d(D, D, 3, padding=1)", "h = self.c_N(h.transpose(1, 2)).relu().transpose(1, 2)", "3"
    ),
    "image convolution": Kind(
        "self.c_N = nn.Conv2d(D, D, 3, padding=1)", "h = self.c_N(h.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)", "4"
    ),
    "attention": Kind(
        _QKV + "\nself.o_N = nn.Linear(D, D)",
        "q, k, v = (t.unflatten(-1, (2, D // 2)).transpose(1, 2) for t in (self.q_N(h), self.k_N(h), self.v_N(h)))\n"
        "h = h + self.o_N(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))",
        "3",
        weight=4,
    ),
    "attention by hand": Kind(
        _QKV,
        "m = torch.ones(h.shape[1], h.shape[1], dtype=torch.bool, device=h.device).triu(1)\n"
        "h = (self.q_N(h) @ self.k_N(h).mT / 4).masked_fill(m, -1e9).softmax(-1) @ self.v_N(h)",
        "3",
    ),
    "relative positions": Kind(
        _QKV,
        "p = torch.arange(h.shape[1], device=h.device)\n"
        "h = (self.q_N(h) @ self.k_N(h).mT / 4 - (p[:, None] - p).abs()).softmax(-1) @ self.v_N(h)",
        "3",
    ),
    "MultiheadAttention": Kind(
        "self.m_N = nn.MultiheadAttention(D, 2, batch_first=True)",
        "h = h + self.m_N(h, h, h, need_weights=False)[0]",
        "3",
    ),
    "TransformerEncoderLayer": Kind(
        "self.t_N = nn.TransformerEncoderLayer(D, 2, DD, 0.0, batch_first=True)", "h = self.t_N(h)", "3"
    ),
    "cumsum": Kind("", "h = h.cumsum(1) / 4", "34"),
    "roll": Kind("", "h = h.roll(1, 1)", "34"),
    "flip": Kind("", "h = h.flip(1)", "34", weight=1),
    "slice": Kind("", "h = h[:, -4:]", "34", resizes=True, weight=1),
    "class token": Kind(
        "self.c_N = nn.Parameter(torch.randn(1, 1, D))",
        "h = torch.cat([self.c_N.expand(h.shape[0], -1, -1), h], 1)",
        "3",
        resizes=True,
    ),
    "without the first": Kind("", "h = torch.cat([h[:, :1], h[:, 1:] * 2], 1)", "34"),
    # shapes
    "if long": Kind("", "if h.shape[1] > 8:\n    h = h[:, -8:] * 2", "34", resizes=True, weight=1),
    "if many": Kind("", "if h.shape[0] < 4:\n    h = h * 2", weight=1),
    "flattened": Kind(_L, "h = self.l_N(h.flatten(0, 1)).reshape(h.shape)", "34"),
    "view": Kind(_L, "h = self.l_N(h).view(h.shape[0], -1, 2, D // 2).flatten(2)", "3"),
    "heads": Kind(_L, "h = self.l_N(h).unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)"),
    "permuted": Kind(_L, "h = self.l_N(h.transpose(0, 1)).transpose(0, 1)", "34"),
    "numel": Kind("", "h = h / (h.numel() / h.shape[-1]) ** 0.5", weight=1),
    "bf16": Kind("self.l_N = nn.Linear(D, D).bfloat16()", "h = self.l_N(h.bfloat16()).float()", weight=1),
    "activation": Kind("", "h = F.gelu(h)", weight=3),
    "mean taken off": Kind("", "h = h - h.mean(-1, keepdim=True)"),
}
