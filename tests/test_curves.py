"""curves.png counts epochs as the terminal does, and marks the best one."""

import pytest
from matplotlib.figure import Figure

from runtime.run_log import RunLog


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """drawn(records): the figure that is drawn of a run in a folder called flowers."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: figures.append(figure))

    def draw(records, **kwargs):
        (tmp_path / "flowers").mkdir(exist_ok=True)
        log = RunLog(tmp_path / "flowers", None, {"acc1": "top-1", "acc5": "top-5"}, "accuracy")
        log.epochs = records
        log.draw_curves()
        return figures[-1]

    return draw


def record(epoch, plain, averaged):
    losses = {"train_loss": 1.0, "test_loss": 1.0, "test_ema_loss": 1.0, "train_lr": 0.1}
    figures = {"test_acc1": plain, "test_ema_acc1": averaged, "test_acc5": 99.0, "test_ema_acc5": 99.0}
    return {"epoch": epoch, **losses, **figures}


def test_best_epoch_is_marked(drawn):
    figure = drawn([record(0, 40.0, 20.0), record(1, 60.0, 70.5), record(2, 65.0, 70.5)])
    quality = figure.axes[1]
    (mark,) = [line for line in quality.lines if line.get_marker() == "*"]
    assert (list(mark.get_xdata()), list(mark.get_ydata())) == ([2], [70.5])
    assert "best: 70.50 in epoch 2" in [text.get_text() for text in quality.get_legend().get_texts()]
    assert list(quality.lines[0].get_xdata()) == [1, 2, 3]
    assert figure.get_suptitle() == "flowers"


def test_without_figures_there_is_nothing_to_mark(drawn):
    figure = drawn([{"epoch": 0, "train_loss": 1.0, "test_loss": 1.0, "train_lr": 0.1}])
    assert not figure.axes[1].lines
