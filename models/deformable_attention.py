"""Deformable agent bi-level routing attention (DBRA; arXiv 2410.08582, section 3.2).

Letters: B batch, H x W map, C channels, Ha x Wa agent grid, g offset groups, m heads.
"""

import torch
from torch import Tensor, nn

from . import ops
from .attention import Router, attend_routed_windows, check_heads, choose_windows
from .attention_maps import AgentMaps, one_image
from .attention_table import register_attention
from .layers import QKV, AddNorm, ConvMlp, DepthwiseConv, PointwiseConv


class _KeyedNorm(nn.Module):
    """A LayerNorm one level down, at the key `norm`, as published."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class OffsetNetwork(nn.Sequential):
    """Predicts where the agents are: strided depthwise convolution, LayerNorm, GELU, projection to how far each moves.

    All groups share its weights. The one number moves an agent along both axes (a departure from DAT, as published).
    """

    def __init__(self, dim: int, groups: int, kernel_size: int, stride: int) -> None:
        width = dim // groups
        super().__init__(
            DepthwiseConv(width, kernel_size, stride, bias=False),
            _KeyedNorm(width),
            nn.GELU(),
            PointwiseConv(width, 1, bias=False),
        )
        self.groups = groups

    def forward(self, q: Tensor) -> Tensor:
        """(B, H, W, C) -> positions (B, Ha, Wa, g, 2)."""
        conv, norm, project = self[0], self[1].norm, self[3]
        x = conv(q).unflatten(-1, (self.groups, -1))
        return ops.positions_of_features(x, norm.weight, norm.bias, norm.eps, project.weight.flatten())


@register_attention("deformable_agent")
class DeformableAgentAttention(nn.Module):
    """DBRA: agents sampled at learnt positions read routed windows; every token then attends to all agents.

    num_heads heads, `offset_groups` groups with their own agent positions, agents every `agent_stride` tokens,
    `topk` of n_win**2 windows per agent window, `rpe_size` = (Qh, Qw), the token map the relative position
    table is made for; (B, H, W, C) in and out. All scales are C**-0.5 with the full width, as published.
    """

    window_grids = ("tokens", "agents")

    def __init__(
        self,
        dim: int,
        num_heads: int,
        n_win: int,
        topk: int,
        offset_groups: int,
        agent_stride: int,
        offset_kernel: int,
        agent_mlp_ratio: float,
        rpe_size: tuple[int, int],
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        if offset_groups < 1 or dim % offset_groups or num_heads % offset_groups:
            raise ValueError(f"{offset_groups} offset groups must divide the width {dim} and the {num_heads} heads")
        self.num_heads, self.scale = num_heads, dim**-0.5
        self.qkv_conv = QKV(PointwiseConv(dim, 3 * dim))
        self.conv_offset_q = OffsetNetwork(dim, offset_groups, offset_kernel, agent_stride)
        self.proj_q = PointwiseConv(dim, dim)
        self.router = Router(n_win, topk, self.scale)
        self.lepe1 = DepthwiseConv(dim, 5, agent_stride)
        self.unifyheads1 = PointwiseConv(dim, dim)
        self.norm2 = AddNorm(dim, eps=1e-6)
        self.mlp = ConvMlp(dim, agent_mlp_ratio)
        self.norm = AddNorm(dim, eps=1e-6)
        self.proj_k = PointwiseConv(dim, dim)
        self.proj_v = PointwiseConv(dim, dim)
        self.rpe_table = nn.Parameter(torch.empty(num_heads, 2 * rpe_size[0] - 1, 2 * rpe_size[1] - 1))
        self.proj_out = PointwiseConv(dim, dim)
        nn.init.trunc_normal_(self.rpe_table, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1], x.shape[2]
        q, _, positions, _, agents = self._read(x)
        keys, values = self.proj_k(agents), self.proj_v(agents)
        out = ops.deformable_attention(q, keys, values, self.rpe_table, positions, self.num_heads, self.scale)
        return self.proj_out(out[:, :height, :width])

    def _read(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(B, H, W, C) -> q, k (padded maps), and of the padded grid of agents: positions (B, Ha, Wa, g, 2), queries
        and what they are after reading, both (B, Ha, Wa, C).
        """
        n_win = self.router.n_win
        x = ops.pad_to_multiple(x, n_win)
        q, q_offsets, k, v, v_lepe = self.qkv_conv(x, uses=(2, 1, 2))

        positions = self.conv_offset_q(q_offsets)
        agents = ops.sample_agents(x, positions)
        # Agents added by padding are zeros at the map's centre and stay in the attention: released dense models
        # were trained with them.
        positions, agents = (ops.pad_to_multiple(t, n_win) for t in (positions, agents))

        agent_q = self.proj_q(agents)
        read = self.lepe1(v_lepe, residual=attend_routed_windows(self.router, agent_q, k, v, self.num_heads))
        agents, normed = self.norm2(agents, self.unifyheads1(read))
        _, agents = self.norm(agents, self.mlp(normed))
        return q, k, positions, agent_q, agents

    def attention_maps(self, x: Tensor) -> AgentMaps:
        """The exact maps of one image (1, H, W, C)."""
        q, k, positions, agent_q, agents = self._read(x)
        stride = self.conv_offset_q[0].stride[0]
        return AgentMaps(
            tokens=(x.shape[1], x.shape[2]),
            num_heads=self.num_heads,
            q=one_image(q),
            k=one_image(k),
            n_win=self.router.n_win,
            idx=one_image(choose_windows(self.router, agent_q, k)),
            scale=self.scale,
            positions=one_image(positions),
            agents=(-(-q.shape[1] // stride), -(-q.shape[2] // stride)),
            agent_q=one_image(agent_q),
            agent_k=one_image(self.proj_k(agents)),
            rpe_table=one_image(self.rpe_table[None]),
            values=one_image(self.proj_v(agents)),
            weight=self.proj_out.weight.flatten(1),
            rest=self.proj_out.bias.expand_as(q[0]),
        )
