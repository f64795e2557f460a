"""What the constructors say to arguments that cannot be."""

import pytest
import timm

import models  # noqa: F401


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        (
            "debiformer_nano",
            {"num_heads": [2, 4, 8]},
            r"num_heads takes one value for each of the 4 stages, not \[2, 4",
        ),
        ("debiformer_nano", {"agent_topk": 4}, "agent_topk takes one value for each of the 4 stages, not 4"),
        ("biformer_tiny", {"depths": (1, 1, 1, 1, 1)}, "depths takes one value"),
        ("biformer_stl", {"topk": "1234"}, "topk takes one value"),
        ("maxvit_stl", {"mlp_ratios": ()}, "mlp_ratios takes one value"),
        ("debiformer_nano", {"num_heads": (1, 2, 5, 4)}, "5 heads do not divide the width 96"),
        ("debiformer_nano", {"offset_groups": (1, 0, 3, 4)}, "0 offset groups must divide"),
        ("biformer_tiny", {"num_heads": (2, 4, 8, 9)}, "9 heads do not divide the width 512"),
        ("biformer_tiny", {"topk": (1, 4, 50, None)}, r"top-k must lie in 1..49"),
        ("debiformer_nano", {"n_win": 0}, "n_win must be at least 1, not 0"),
        ("biformer_stl_nchw", {"num_heads": (0, 6, 12, 8)}, "0 heads do not divide the width 96"),
    ],
)
def test_arguments_that_do_not_fit_are_named(name, arguments, words):
    with pytest.raises(ValueError, match=words):
        timm.create_model(name, **arguments)
