"""Deformable agent attention as arithmetic (DeBiFormer, arXiv 2410.08582, section 3.2; DAT, arXiv 2201.00520).

Letters: B batch, H x W token map, Ha x Wa agent grid, C channels, m heads, g offset groups.
Positions are (y, x) in [-1, 1], where -1 and 1 are the centres of the first and the last row or column.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import deformable_export, deformable_torch
from .backend import WORKSPACE, choose_backend
from .operators import differentiable


def reference_points(height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Centres of the cells of an agent grid: (height, width, 2) in (-1, 1), y first."""
    y = (torch.arange(height, device=device, dtype=dtype) + 0.5) / height * 2 - 1
    x = (torch.arange(width, device=device, dtype=dtype) + 0.5) / width * 2 - 1
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1)


def agent_positions(offsets: Tensor) -> Tensor:
    """Reference point plus offset, clamped to the map.

    offsets: (B, Ha, Wa, g), one scalar that moves an agent along y and x alike.
    Returns (B, Ha, Wa, g, 2) in [-1, 1], in float32 at least: half precision cannot tell neighbouring tokens apart.
    """
    dtype = torch.promote_types(offsets.dtype, torch.float32)
    reference = reference_points(offsets.shape[1], offsets.shape[2], offsets.device, dtype)
    return (reference[:, :, None] + offsets.to(dtype)[..., None]).clamp(-1, 1)


def positions_of_features(x: Tensor, weight: Tensor, bias: Tensor, eps: float, projection: Tensor) -> Tensor:
    """Agents' positions by what is known of each: `agent_positions` of projection . GELU(LayerNorm(x)).

    x: (B, Ha, Wa, g, D); weight, bias, projection: (D).
    """
    if choose_backend(None, x) == "triton":
        return _positions(x, weight, bias, projection, eps)
    x = F.gelu(F.layer_norm(x, weight.shape, weight, bias, eps))
    return agent_positions(F.linear(x, projection[None]).squeeze(-1))


def sample_agents(x: Tensor, positions: Tensor) -> Tensor:
    """Read the map at the agents' positions, bilinearly; each group reads its own channels at its own positions.

    x: (B, H, W, C); positions: (B, Ha, Wa, g, 2) in [-1, 1]. Returns agents (B, Ha, Wa, C) in x's dtype.
    """
    backend = choose_backend(None, x)
    if backend == "triton":
        return _sample(x, positions)
    if backend == "export":
        return deformable_export.sample(x, positions)
    return _sample_rows(x, positions)


def _sample_rows(x: Tensor, positions: Tensor) -> Tensor:
    """`sample_agents` by gathering the four tokens around each agent: the map is neither copied nor turned."""
    b, h, w, c = x.shape
    groups = positions.shape[3]
    cells = (positions + 1) * (positions.new_tensor([h - 1, w - 1]) / 2)
    corner = cells.detach().floor()
    fractions = (cells - corner).flatten(0, 3)  # (B*Ha*Wa*g, 2)
    # What follows holds for the four tokens around each position: those of two rows by two columns.
    shares = torch.stack([1 - fractions, fractions])
    shares = shares[:, None, :, 0] * shares[:, :, 1]
    (row, column), offsets = corner.long().unbind(-1), torch.arange(2, device=x.device)[:, None, None, None, None]
    row, column = (row + offsets)[:, None], column + offsets
    inside = (row < h) & (column < w)  # the others count as zeros
    batch = torch.arange(b, device=x.device)[:, None, None, None]
    group = torch.arange(groups, device=x.device)
    index = ((batch * h + row.clamp(0, h - 1)) * w + column.clamp(0, w - 1)) * groups + group
    read = x.reshape(-1, c // groups).index_select(0, index.flatten()).unflatten(0, (4, -1))
    shares = (shares * inside.flatten(2)).flatten(0, 1)
    sampled = (read.to(shares.dtype) * shares[..., None]).sum(0)
    return sampled.view(*positions.shape[:3], c).to(x.dtype)


def token_grid(height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Positions of the tokens of a map: (height, width, 2) with i / (side - 1) * 2 - 1; a side of one sits at -1."""
    y = torch.arange(height, device=device, dtype=dtype) / max(height - 1, 1) * 2 - 1
    x = torch.arange(width, device=device, dtype=dtype) / max(width - 1, 1) * 2 - 1
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1)


def relative_position_bias(rpe_table: Tensor, positions: Tensor, height: int, width: int) -> Tensor:
    """Bilinear reads of each head's table at (token - agent) / 2, zero outside.

    rpe_table: (m, 2Q-1, 2Q-1); positions: (B, N, g, 2) of N agents; heads are split over the groups in order.
    Returns (B, m, height*width, N) in the positions' dtype.
    """
    b, n, g, _ = positions.shape
    m = rpe_table.shape[0]
    tokens = token_grid(height, width, positions.device, positions.dtype).view(1, 1, -1, 1, 2)
    displacement = (tokens - positions.permute(0, 2, 1, 3)[:, :, None]) / 2  # (B, g, H*W, N, 2)
    tables = rpe_table.to(positions.dtype).view(1, g, m // g, *rpe_table.shape[1:]).expand(b, -1, -1, -1, -1)
    bias = F.grid_sample(tables.flatten(0, 1), displacement.flip(-1).flatten(0, 1), mode="bilinear", align_corners=True)
    return bias.view(b, m, height * width, n)


def deformable_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpe_table: Tensor,
    positions: Tensor,
    num_heads: int,
    scale: float,
    backend: str | None = None,
    workspace: int = WORKSPACE,
) -> Tensor:
    """Every token attends to all agents, with a bias read at their relative position.

    q: (B, H, W, C) tokens; k, v: (B, Ha, Wa, C) agents; rpe_table: (m, 2Q-1, 2Q-1);
    positions: (B, Ha, Wa, g, 2) in [-1, 1], float32 at least.
    backend: see `ops.backend`; ValueError for one that cannot run.
    workspace: bytes that "torch" may use for biases and logits at a time, at least those of one row of tokens, and
    "triton", in backward alone, for gradients of logits, at least those of one image and 16 agents.
    Returns (B, H, W, C).
    """
    name = choose_backend(backend, q, num_heads)
    if not k.dtype == v.dtype == q.dtype:  # under autocast they may come from different layers
        k, v = k.to(q.dtype), v.to(q.dtype)
    if name == "reference":
        return deformable_attention_reference(q, k, v, rpe_table, positions, num_heads, scale)
    if name == "export":
        return deformable_export.forward(q, k, v, rpe_table, positions, num_heads, scale)
    return _attend(q, k, v, rpe_table, positions, num_heads, scale, name, workspace)[0]


def deformable_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, rpe_table: Tensor, positions: Tensor, num_heads: int, scale: float
) -> Tensor:
    """`deformable_attention` with the whole bias in memory and PyTorch's own attention."""
    b, h, w, c = q.shape

    def heads(x: Tensor) -> Tensor:  # (B, y, x, C) -> (B, m, y*x, C/m)
        return x.reshape(b, -1, num_heads, c // num_heads).transpose(1, 2)

    bias = relative_position_bias(rpe_table, positions.flatten(1, 2), h, w).to(q.dtype)
    out = F.scaled_dot_product_attention(heads(q), heads(k), heads(v), attn_mask=bias, scale=scale)
    return out.transpose(1, 2).reshape(b, h, w, c)


# -- operators: the fast backends of attention, and sampling on GPUs --------------------------------------------------


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpe_table: Tensor,
    positions: Tensor,
    num_heads: int,
    scale: float,
    backend: str,
    workspace: int,
) -> tuple[Tensor, Tensor]:
    """Output, and what the backend wants to know of it in backward (nothing, for "torch")."""
    if backend == "torch":
        out = deformable_torch.forward(q, k, v, rpe_table, positions, num_heads, scale, workspace)
        return out, q.new_empty(0, dtype=torch.float32)
    from . import deformable_triton

    return deformable_triton.forward(q, k, v, rpe_table, positions, num_heads, scale)


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpe_table: Tensor,
    positions: Tensor,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    scale: float,
    backend: str,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if backend == "torch":
        return deformable_torch.backward(grad, q, k, v, rpe_table, positions, num_heads, scale, workspace)
    from . import deformable_triton

    return deformable_triton.backward(grad, q, k, v, rpe_table, positions, out, lse, num_heads, scale, workspace)


def _outputs_like(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    positions: Tensor,
    num_heads: int,
    scale: float,
    backend: str,
    _: int,
) -> tuple[Tensor, Tensor]:
    lse = (0,) if backend == "torch" else (q.shape[0], num_heads, q.shape[1] * q.shape[2])
    return q.new_empty(q.shape), q.new_empty(lse, dtype=torch.float32)


def _products(q: torch.Size, k: torch.Size) -> int:
    """Operations of one matrix product of all tokens and agents."""
    return 2 * q.numel() * k[1] * k[2]


_attend = differentiable(
    *("deformable_attention", _forward, _backward, _outputs_like),
    gradients=range(5),
    # Backward computes the logits again.
    flops=(
        lambda q, k, *_, **__: 2 * _products(q, k),
        lambda grad, q, k, *_, **__: 5 * _products(q, k),
    ),
)


def _positions_forward(x: Tensor, weight: Tensor, bias: Tensor, projection: Tensor, eps: float) -> Tensor:
    from . import positions_triton

    return positions_triton.forward(x, weight, bias, projection, eps)


def _positions_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, projection: Tensor, out: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    from . import positions_triton

    return positions_triton.backward(grad, x, weight, bias, projection, eps)


_positions = differentiable(
    *("positions_of_features", _positions_forward, _positions_backward),
    lambda x, *_: x.new_empty((*x.shape[:-1], 2), dtype=torch.float32),
    gradients=range(4),
    packed=3,
    # The projection's products.
    flops=(lambda x, *_, **__: 2 * x.numel(), lambda grad, x, *_, **__: 4 * x.numel()),
)


def _sample_forward(x: Tensor, positions: Tensor) -> Tensor:
    from . import sampling_triton

    return sampling_triton.forward(x, positions)


def _sample_backward(grad: Tensor, x: Tensor, positions: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    from . import sampling_triton

    return sampling_triton.backward(grad, x, positions)


_sample = differentiable(
    *("sample_agents", _sample_forward, _sample_backward),
    lambda x, positions: x.new_empty((*positions.shape[:3], x.shape[3])),
    gradients=range(2),
)
