"""Deformable attention in Triton: biases are sampled where they are added, logits and biases never reach memory.

Letters: B batch, T = H*W tokens, N agents, C channels, m heads of D = C/m, g offset groups, Th x Tw cells of a head's
table. Tensors q, out (B, H, W, C), k, v (B, Ha, Wa, C), rpe_table (m, Th, Tw) and positions (B, Ha, Wa, g, 2) stay as
they lie. Token (i, j) reads agent n's bias at the cell (i * step_y + origin_y[n], j * step_x + origin_x[n]) of the
table, between four of its entries, where step = (Th-1) / 2 / (H-1) and origin = (Th-1) * (1 - position) / 4:
`rpe_table_triton`. Logits and weights are powers of two.

_forward         One program: BLOCK_M tokens of one image and head; all agents, BLOCK_N at a time, by online softmax.
                 Writes out and lse (B, m, T) in base 2.
_backward_agents One program: BLOCK_N agents of one image and head, and one share of the tokens. Its sums for k, v and
                 the agents' positions go to a place of its own, (shares, B, N, C) and (shares, B, m, N, 2) in float32,
                 and are added up afterwards. It also leaves the gradients of its logits, (B, m, N, T) in q's type, for
                 as many images and agents at a time as the workspace takes. Where it has all agents, it writes dq too.
_backward_q      Where there are more agents: dq, and delta (B, m, T) = sum(grad * out) on the way.

The table's gradient is gathered from those of the logits. So every sum has a fixed order, and every run gives the same
bits.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch_triton import Kernel, as_tokens, cdiv, padded, precision, strides
from .rpe_table_triton import PROGRAMS, add_table_gradient_, load_agents, pack, sample
from .tiles_triton import LOG2E, dot, load_gradient, load_rows, rounded, softmax_step, store_attention, store_rows

TILE = 64
"""Agents at most that backward takes in one pass."""


@triton.jit
def _forward(
    q_ptr, k_ptr, v_ptr, packed_ptr, begins_ptr, places_ptr, out_ptr, lse_ptr,
    q_image, k_image, v_image, q_token, k_token, v_token,
    num_heads, groups, tokens, width, agents, table_h, table_w, packed_size, row_of_agents, all_agents,
    step_y, step_x, scale,
    ON_CELLS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    type: tl.constexpr = q_ptr.dtype.element_ty
    head = tl.program_id(0) % num_heads
    blocks = tl.cdiv(tokens, BLOCK_M)
    image = (tl.program_id(0) // num_heads // blocks).to(tl.int64)
    token = tl.program_id(0) // num_heads % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    is_token = token < tokens
    place = tl.minimum(token, tokens - 1)
    row = (image * groups + head // (num_heads // groups)) * row_of_agents
    packed_ptr += head * packed_size
    first = head * HEAD_DIM
    channel = tl.arange(0, BLOCK_D)
    q = load_rows(q_ptr + image * q_image + first, token * q_token, is_token, channel, HEAD_DIM, BLOCK_D)

    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, agents, BLOCK_N):
        agent = start + tl.arange(0, BLOCK_N)
        is_agent = agent < agents
        k = load_rows(k_ptr + image * k_image + first, agent * k_token, is_agent, channel, HEAD_DIM, BLOCK_D)
        v = load_rows(v_ptr + image * v_image + first, agent * v_token, is_agent, channel, HEAD_DIM, BLOCK_D)
        begin, y, x = load_agents(begins_ptr, places_ptr, row, agent, all_agents)
        bias, _, _ = sample(
            packed_ptr, begin, y, x, place, width, step_y, step_x, table_h, table_w,
            ON_CELLS, AGENTS_FIRST=False, type=type,
        )  # fmt: skip
        logits = dot(q, tl.trans(k), PRECISION) * (scale * LOG2E) + bias * LOG2E
        logits = tl.where(is_agent[None, :], logits, float("-inf"))
        largest, total, out = softmax_step(logits, v, largest, total, out, PRECISION)

    store_attention(
        out_ptr, lse_ptr, image, head, num_heads, tokens, token, is_token, channel, largest, total, out,
        HEAD_DIM, BLOCK_D,
    )  # fmt: skip


@triton.jit
def _backward_q(
    grad_ptr, q_ptr, k_ptr, v_ptr, packed_ptr, begins_ptr, places_ptr, out_ptr, lse_ptr, delta_ptr, dq_ptr,
    q_image, k_image, v_image, q_token, k_token, v_token,
    num_heads, groups, tokens, width, agents, table_h, table_w, packed_size, row_of_agents, all_agents,
    step_y, step_x, scale,
    ON_CELLS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    type: tl.constexpr = q_ptr.dtype.element_ty
    head = tl.program_id(0) % num_heads
    blocks = tl.cdiv(tokens, BLOCK_M)
    image = (tl.program_id(0) // num_heads // blocks).to(tl.int64)
    token = tl.program_id(0) // num_heads % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    is_token = token < tokens
    place = tl.minimum(token, tokens - 1)
    row = (image * groups + head // (num_heads // groups)) * row_of_agents
    packed_ptr += head * packed_size
    first = head * HEAD_DIM
    channel = tl.arange(0, BLOCK_D)
    q = load_rows(q_ptr + image * q_image + first, token * q_token, is_token, channel, HEAD_DIM, BLOCK_D)
    rows, grad, lse, delta = load_gradient(
        grad_ptr, out_ptr, lse_ptr, delta_ptr, image, head, num_heads, tokens, token, is_token, channel,
        True, HEAD_DIM, BLOCK_D,
    )  # fmt: skip
    tl.store(delta_ptr + (image * num_heads + head) * tokens + token, delta, mask=is_token)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, agents, BLOCK_N):
        agent = start + tl.arange(0, BLOCK_N)
        is_agent = agent < agents
        k = load_rows(k_ptr + image * k_image + first, agent * k_token, is_agent, channel, HEAD_DIM, BLOCK_D)
        v = load_rows(v_ptr + image * v_image + first, agent * v_token, is_agent, channel, HEAD_DIM, BLOCK_D)
        begin, y, x = load_agents(begins_ptr, places_ptr, row, agent, all_agents)
        bias, _, _ = sample(
            packed_ptr, begin, y, x, place, width, step_y, step_x, table_h, table_w,
            ON_CELLS, AGENTS_FIRST=False, type=type,
        )  # fmt: skip
        logits = dot(q, tl.trans(k), PRECISION) * (scale * LOG2E) + bias * LOG2E
        weights = tl.exp2(logits - lse[:, None])  # of agents that do not exist too: their rows of k are zeros
        dlogits = weights * (dot(grad, tl.trans(v), PRECISION) - delta[:, None])
        dq += dot(rounded(dlogits, k.dtype), k, PRECISION)
    store_rows(dq_ptr + first, rows, is_token, channel, dq * scale, HEAD_DIM, BLOCK_D)


@triton.jit
def _backward_agents(
    grad_ptr, q_ptr, k_ptr, v_ptr, packed_ptr, begins_ptr, places_ptr, out_ptr, lse_ptr, delta_ptr,
    dq_ptr, dk_ptr, dv_ptr, dpositions_ptr, dlogits_ptr,
    q_image, k_image, v_image, q_token, k_token, v_token,
    num_heads, groups, tokens, width, agents, table_h, table_w, packed_size, row_of_agents, all_agents,
    step_y, step_x, scale,
    images, first_image, first_agent, some_agents, shares, pitch,
    WITH_DQ: tl.constexpr, ON_CELLS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    type: tl.constexpr = q_ptr.dtype.element_ty
    head = tl.program_id(0) % num_heads
    share = tl.program_id(0) // num_heads % shares
    blocks = tl.cdiv(some_agents, BLOCK_N)
    local_image = (tl.program_id(0) // num_heads // shares // blocks).to(tl.int64)
    image = first_image + local_image
    local_agent = tl.program_id(0) // num_heads // shares % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    is_agent = local_agent < some_agents
    agent = first_agent + local_agent
    row = (image * groups + head // (num_heads // groups)) * row_of_agents
    packed_ptr += head * packed_size
    first = head * HEAD_DIM
    channel = tl.arange(0, BLOCK_D)
    k = load_rows(k_ptr + image * k_image + first, agent * k_token, is_agent, channel, HEAD_DIM, BLOCK_D)
    v = load_rows(v_ptr + image * v_image + first, agent * v_token, is_agent, channel, HEAD_DIM, BLOCK_D)
    begin, y, x = load_agents(begins_ptr, places_ptr, row, tl.minimum(agent, row_of_agents - 1), all_agents)
    dlogits_rows = ((local_image * num_heads + head) * some_agents + local_agent) * pitch

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dy = tl.zeros([BLOCK_N], tl.float32)
    dx = tl.zeros([BLOCK_N], tl.float32)
    span = tl.cdiv(tokens, shares)
    end = tl.minimum((share + 1) * span, tokens)
    for start in range(share * span, end, BLOCK_M):
        token = start + tl.arange(0, BLOCK_M)
        is_token = token < end
        q = load_rows(q_ptr + image * q_image + first, token * q_token, is_token, channel, HEAD_DIM, BLOCK_D)
        rows, grad, lse, delta = load_gradient(
            grad_ptr, out_ptr, lse_ptr, delta_ptr, image, head, num_heads, tokens, token, is_token, channel,
            WITH_DQ, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        # Agents are the rows here, so that no tile of weights has to be transposed for dk and dv.
        bias, by_y, by_x = sample(
            packed_ptr, begin, y, x, tl.minimum(token, tokens - 1), width, step_y, step_x, table_h, table_w,
            ON_CELLS, AGENTS_FIRST=True, type=type,
        )  # fmt: skip
        logits = dot(k, tl.trans(q), PRECISION) * (scale * LOG2E) + bias * LOG2E
        weights = tl.exp2(logits - lse[None, :])
        dv += dot(rounded(weights, grad.dtype), grad, PRECISION)
        dlogits = weights * (dot(v, tl.trans(grad), PRECISION) - delta[None, :])
        dy += tl.sum(dlogits * by_y, 1)
        dx += tl.sum(dlogits * by_x, 1)
        dlogits = rounded(dlogits, q.dtype)
        dk += dot(dlogits, q, PRECISION)
        if WITH_DQ:
            dq = dot(tl.trans(dlogits), k, PRECISION)
            store_rows(dq_ptr + first, rows, is_token, channel, dq * scale, HEAD_DIM, BLOCK_D)
        tl.store(
            dlogits_ptr + dlogits_rows[:, None] + token[None, :], dlogits, mask=is_agent[:, None] & is_token[None, :]
        )

    partial = (share * images + local_image).to(tl.int64)
    rows = (partial * some_agents + local_agent) * (num_heads * HEAD_DIM)
    store_rows(dk_ptr + first, rows, is_agent, channel, dk * scale, HEAD_DIM, BLOCK_D)
    store_rows(dv_ptr + first, rows, is_agent, channel, dv, HEAD_DIM, BLOCK_D)
    at = dpositions_ptr + ((partial * num_heads + head) * some_agents + local_agent) * 2
    tl.store(at, dy * (table_h - 1) * -0.25, mask=is_agent)
    tl.store(at + 1, dx * (table_w - 1) * -0.25, mask=is_agent)


# One stage: loads ahead would bring whole tiles of the four table entries into shared memory.
_BLOCKS = [
    *((64, 32, 4, 1), (64, 64, 4, 1), (32, 64, 4, 1), (32, 32, 4, 1), (32, 16, 4, 1), (16, 64, 1, 1)),
    *((16, 32, 1, 1), (16, 16, 1, 1)),
]
_AGENT_BLOCKS = [(16, 64, 4, 1), (32, 64, 8, 1), (32, 32, 4, 1), (16, 32, 2, 1), (16, 16, 1, 1)]
_FLOAT32_BLOCKS = [(64, 32, 4, 1), (32, 32, 4, 1), (16, 32, 1, 1), (16, 16, 1, 1)]
_run_forward = Kernel(
    *(_forward, _BLOCKS, lambda arguments, block: cdiv(arguments["agents"], block.n)), float32=_FLOAT32_BLOCKS
)
_run_backward_q = Kernel(
    *(_backward_q, _BLOCKS, lambda arguments, block: cdiv(arguments["agents"], block.n)), float32=_FLOAT32_BLOCKS
)
_run_backward_agents = Kernel(
    _backward_agents,
    _AGENT_BLOCKS,
    lambda arguments, block: cdiv(cdiv(arguments["tokens"], arguments["shares"]), block.m),
    # A program that writes dq has to see all agents.
    lambda block, size, arguments: (
        block.m <= size[0] and (block.n == size[1] if arguments["WITH_DQ"] else block.n <= size[1])
    ),
    float32=[(16, 64, 4, 1), (16, 32, 2, 1), (16, 16, 1, 1)],
)


def _geometry(q: Tensor, k: Tensor, rpe_table: Tensor, positions: Tensor) -> dict[str, Any]:
    """Sizes, and how far one token step leads in the table."""
    (_, height, width, _), (num_heads, table_h, table_w) = q.shape, rpe_table.shape
    return {
        **{"num_heads": num_heads, "groups": positions.shape[3], "tokens": height * width, "width": width},
        **{"agents": k.shape[1] * k.shape[2], "table_h": table_h, "table_w": table_w},
        **{"step_y": (table_h - 1) / 2 / max(height - 1, 1), "step_x": (table_w - 1) / 2 / max(width - 1, 1)},
        "ON_CELLS": (table_h, table_w) == (2 * height - 1, 2 * width - 1),
    }


def _layout(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> dict[str, Any]:
    q, k, v, head_dim = as_tokens(q), as_tokens(k), as_tokens(v), q.shape[-1] // num_heads
    return {
        **{"q_ptr": q, "k_ptr": k, "v_ptr": v, **strides(q=q, k=k, v=v)},
        **{"HEAD_DIM": head_dim, "BLOCK_D": padded(head_dim), "PRECISION": precision(q.dtype)},
    }


def forward(
    q: Tensor, k: Tensor, v: Tensor, rpe_table: Tensor, positions: Tensor, num_heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    """See `ops.deformable_attention`. Returns out (B, H, W, C) and lse (B, m, H*W), in base 2, for `backward`."""
    b, tokens = q.shape[0], q.shape[1] * q.shape[2]
    out = q.new_empty(q.shape)
    lse = q.new_empty((b, num_heads, tokens), dtype=torch.float32)
    geometry, positions = _geometry(q, k, rpe_table, positions), positions.contiguous()
    _run_forward(
        lambda block: b * cdiv(tokens, block.m) * num_heads, (padded(tokens), padded(geometry["agents"])),
        **_layout(q, k, v, num_heads), **geometry, **pack(q, rpe_table, positions, geometry["ON_CELLS"]),
        out_ptr=out, lse_ptr=lse, scale=scale,
    )  # fmt: skip
    return out, lse


def backward(
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
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, rpe_table and positions, contiguous."""
    b, c = q.shape[0], q.shape[-1]
    geometry, positions = _geometry(q, k, rpe_table, positions), positions.contiguous()
    tokens, agents, groups = geometry["tokens"], geometry["agents"], geometry["groups"]
    pitch, workspace = 16 * cdiv(tokens, 16), 4 * workspace  # a GPU has more room, and is slower in parts
    per_agent = num_heads * pitch * q.element_size()
    some_agents = agents if per_agent * agents <= workspace else min(agents, max(16, workspace // per_agent))
    some_images = min(b, max(1, workspace // (per_agent * some_agents)))
    one_pass = some_agents == agents <= TILE
    dq, delta = q.new_empty(q.shape), lse if one_pass else torch.empty_like(lse)
    common = {
        **{"grad_ptr": grad.contiguous(), "scale": scale},
        **pack(q, rpe_table, positions, geometry["ON_CELLS"]),
        **{"out_ptr": out, "lse_ptr": lse, "delta_ptr": delta, "dq_ptr": dq},
        **_layout(q, k, v, num_heads),
        **geometry,
    }
    if not one_pass:
        _run_backward_q(lambda block: b * cdiv(tokens, block.m) * num_heads, (padded(tokens), padded(agents)), **common)
    dtable = torch.zeros(rpe_table.shape, dtype=torch.float32, device=q.device)
    dlogits = q.new_empty(some_images * num_heads * some_agents * pitch)
    parts = []
    for image in range(0, b, some_images):
        for agent in range(0, agents, some_agents):
            part = slice(image, min(image + some_images, b)), slice(agent, min(agent + some_agents, agents))
            parts.append((part, _agent_gradients(part, dlogits, {**common, "pitch": pitch, "WITH_DQ": one_pass})))
            add_table_gradient_(dtable, part, dlogits, positions, geometry, pitch)
    if len(parts) == 1:
        dk, dv, dpositions = parts[0][1]
    else:
        dk, dv = k.new_empty((b, agents, c)), v.new_empty((b, agents, c))
        dpositions = positions.new_empty((b, agents, groups, 2))
        for part, gradients in parts:
            for whole, x in zip((dk, dv, dpositions), gradients, strict=True):
                whole[part] = x
    dpositions = dpositions.to(positions.dtype).contiguous().view(positions.shape)
    return dq, dk.to(k.dtype).view(k.shape), dv.to(v.dtype).view(v.shape), dtable.to(rpe_table.dtype), dpositions


def _agent_gradients(
    part: tuple[slice, slice], dlogits: Tensor, common: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of some images' and agents' k, v (I, n, C) and positions (I, n, g, 2); fills `dlogits`."""
    images, agents = (s.stop - s.start for s in part)
    num_heads, groups, tokens = common["num_heads"], common["groups"], common["tokens"]
    shares = max(1, min(PROGRAMS // (images * num_heads * cdiv(agents, TILE)), tokens // 256))
    dtype = dlogits.dtype if shares == 1 else torch.float32
    shape = shares, images, agents, num_heads * common["HEAD_DIM"]
    dk, dv = (dlogits.new_empty(shape, dtype=dtype) for _ in "kv")
    dpositions = dlogits.new_empty((shares, images, num_heads, agents, 2), dtype=torch.float32)
    _run_backward_agents(
        lambda block: images * cdiv(agents, block.n) * shares * num_heads, (padded(tokens), padded(agents)),
        **common, dk_ptr=dk, dv_ptr=dv, dpositions_ptr=dpositions, dlogits_ptr=dlogits,
        images=images, first_image=part[0].start, first_agent=part[1].start, some_agents=agents, shares=shares,
    )  # fmt: skip
    dk, dv = (x[0] if shares == 1 else x.sum(0) for x in (dk, dv))
    return dk, dv, dpositions.unflatten(2, (groups, -1)).sum((0, 3)).transpose(1, 2)
