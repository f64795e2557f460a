"""torch.hub finds every model, from any folder."""

from support import ROOT, command

import hubconf
from models import MODEL_NAMES

LOAD = f"""
import sys, timm, torch
for name in sys.argv[1:]:
    with torch.device("meta"):
        model = torch.hub.load({str(ROOT)!r}, name, source="local", num_classes=3)
        twin = timm.create_model(name, num_classes=3)
    assert str(model) == str(twin) and model.pretrained_cfg == twin.pretrained_cfg, name
torch.manual_seed(0)
model = torch.hub.load({str(ROOT)!r}, "debiformer_nano", source="local").eval()
torch.manual_seed(0)
twin = timm.create_model("debiformer_nano").eval()
x = torch.randn(2, 3, 64, 64)
assert torch.equal(model(x), twin(x))
"""


def test_entry_points_are_the_models():
    """torch.hub lists whatever is callable there."""
    found = {name for name, value in vars(hubconf).items() if callable(value) and not name.startswith("_")}
    assert found == set(MODEL_NAMES)
    assert "64-pixel" in hubconf.debiformer_nano.__doc__


def test_every_model_loads_from_a_local_folder(tmp_path):
    printed = command("-c", LOAD, *MODEL_NAMES, cwd=tmp_path)
    assert printed.returncode == 0, printed.stderr
