"""What a model sees in images.

python -m tools.predict cat.jpg dog.jpg --model debiformer_tiny --checkpoint tiny.pth
"""

from collections.abc import Iterator, Sequence

import torch

import utils
from models.labels import in_words
from models.pixels import normalize
from runtime import distributed
from runtime.errors import UsageError, exit_on_error
from runtime.samplers import Key
from tasks.classification.sources import ImageFiles, Samples
from tasks.classification.transforms import ImageTransform, eval_transform, pixels_for
from tasks.loading import Transformed

from .loading import UNTRAINED, Loaded, load_from, model_parser


@torch.no_grad()
def predict(
    loaded: Loaded, paths: Sequence[str], device: torch.device | str = "cpu", most: int = 5
) -> Iterator[tuple[str, list[tuple[str, float]]]]:
    """Per image its path and the `most` likely classes, best first, with their probabilities in 0..1.

    Synsets are given by what they mean. UsageError for a file that is no image, and for a size the model cannot take.
    """
    files = Samples(ImageFiles(((path, 0) for path in paths), []), numbers=None)
    images = Transformed(files, ImageTransform(eval_transform(loaded.options)), seed=0)
    model, pixels = loaded.model.to(device), pixels_for(loaded.options)
    for number, path in enumerate(paths):
        image = images[Key(number)]["image"]
        try:
            logits = model(normalize(image[None].to(device), pixels))
        except (AssertionError, RuntimeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise UsageError(f"--input_size {loaded.options.input_size}: {reason}") from error
        top = logits[0].float().softmax(-1).topk(min(most, logits.shape[-1]))
        names = in_words(loaded.labels[index] for index in top.indices.tolist())
        yield path, list(zip(names, top.values.tolist(), strict=True))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = model_parser("tools.predict", "Print the five likeliest classes of each image.")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cuda, cuda:N, mps or cpu")
    args, loaded = load_from(parser, argv)
    if not loaded.trained:
        print(UNTRAINED)
    for path, classes in predict(loaded, args.images, utils.choose_device(args.device, distributed.DistInfo())):
        print(path)
        for name, probability in classes:
            print(f"  {probability:6.1%}  {name}")


if __name__ == "__main__":
    exit_on_error("tools.predict", main)
