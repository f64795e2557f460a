"""Label maps: made, read, and refused where they are not of the data."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from support import CLASSES, command, complaint
from torchvision.transforms.functional import pil_to_tensor

from models.pixels import normalize, pixels_of
from runtime.distributed import DistInfo
from runtime.images import open_rgb
from tasks.classification.sources import image_folder as open_folder
from tasks.classification.sources import name_in, names_in
from tasks.token_labeling import generate
from tasks.token_labeling.features import BASIS
from tasks.token_labeling.maps import INDEX, open_maps

KWARGS = {"embed_dims": (16, 32, 48, 64), "depths": (1, 1, 1, 1)}


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.manual_seed(0)
    model = timm.create_model("debiformer_nano", num_classes=4, img_size=64, **KWARGS)
    args = {"model": "debiformer_nano", "input_size": 64, "model_kwargs": {n: list(v) for n, v in KWARGS.items()}}
    torch.save({"model": model.state_dict(), "args": args, "classes": list(CLASSES)}, path)
    return path


@pytest.fixture
def make(teacher, image_folder, tmp_path):
    def run(*argv, info=DistInfo(), output="maps"):  # noqa: B008
        base = ["--data_path", str(image_folder), "--teacher", "debiformer_nano", "--teacher_path", str(teacher)]
        base += ["--output", str(tmp_path / output), "--shard_size", "20", "--num_workers", "0", "--device", "cpu"]
        generate.generate(generate.parse([*base, *argv]), info)
        return tmp_path / output

    return run


def opened(maps, data, classes=CLASSES, num_classes=4):
    source = open_folder(str(data), "train")
    return open_maps(str(maps), names_in(source, str(data)), classes, num_classes)


def refused(maps, data, **known):
    return complaint(lambda: opened(maps, data, **known))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_maps_say_what_the_teacher_sees_at_each_place(make, image_folder, teacher):
    folder = make()
    maps, source = opened(folder, image_folder), open_folder(str(image_folder), "train")
    content = torch.load(teacher)
    model = timm.create_model("debiformer_nano", num_classes=4, img_size=128, **KWARGS).eval()
    weights = content["model"]
    for name, value in model.state_dict().items():
        if name.endswith("rpe_table"):  # built for images of 64 pixels
            table = F.interpolate(weights[name][None], value.shape[1:], mode="bilinear", align_corners=True)
            weights[name] = table[0]
    model.load_state_dict(weights)
    for number in (0, 19, 20, 47):
        image = open_rgb(source[number][0]).resize((128, 128), Image.Resampling.BICUBIC)
        with torch.no_grad():
            features = model.forward_features(normalize(pil_to_tensor(image)[None], pixels_of("debiformer_nano")))
            logits = F.linear(features[0].movedim(0, -1), model.head.weight, model.head.bias)
        expected = logits.log_softmax(-1)
        found = maps.read(number, name_in(source, str(image_folder), number))
        assert found["values"].shape == (4, 4, 4)
        assert found["indices"].dtype == torch.int16
        for row in range(4):
            for column in range(4):
                order = found["indices"][:, row, column].long()
                assert torch.allclose(found["values"][:, row, column].float(), expected[row, column][order], atol=2e-3)
        assert (found["values"].diff(dim=0) <= 0).all()
    index = json.loads((folder / INDEX).read_text())
    assert (index["images"], index["grid"], index["classes"]) == (48, [4, 4], list(CLASSES))
    assert len(index["shards"]) == 3


def test_complete_shards_are_kept_and_the_others_made_again(make):
    folder = make()
    whole, kept = contents(folder), os.stat(folder / "shard-00001.safetensors").st_mtime_ns
    (folder / "shard-00000.safetensors").unlink()
    torn = folder / "shard-00002.safetensors"
    torn.write_bytes(torn.read_bytes()[:-40])
    make()
    assert contents(folder) == whole
    assert os.stat(folder / "shard-00001.safetensors").st_mtime_ns == kept


def test_interrupted_job_goes_on_without_an_index(make):
    whole = contents(make())
    half = make(info=DistInfo(0, 2), output="half")
    assert sorted(contents(half)) == ["shard-00000.safetensors", "shard-00002.safetensors"]
    make(info=DistInfo(1, 2), output="half")
    assert contents(half) == whole


@pytest.mark.slow
def test_processes_of_torchrun_share_the_work(make, image_folder, teacher, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    job = ["-m", "tasks.token_labeling.generate", "--data-path", image_folder, "--teacher", "debiformer_nano"]
    job += ["--teacher_path", teacher, "--output", tmp_path / "shared", "--shard_size", "20", "--num_workers", "1"]
    done = command(*torchrun, *job)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "shared") == contents(make())


def test_another_job_is_not_mixed_with_the_first(make):
    folder = make()
    assert "choose another --output" in complaint(make, "--input_size", "64")
    (folder / INDEX).unlink()
    assert "choose another --output" in complaint(make, "--input_size", "64")


@pytest.mark.parametrize("teacher_name", ["resnet10t", "swin_s3_tiny_224"])
def test_teachers_of_either_layout_of_memory(teacher_name):
    torch.manual_seed(0)
    size = {} if teacher_name == "resnet10t" else {"img_size": 64, "depths": (1, 1, 1, 1), "window_size": 2}
    model = timm.create_model(teacher_name, num_classes=7, **size).eval()
    images = torch.randint(0, 255, (2, 3, 64, 64), dtype=torch.uint8)
    teacher = generate.Teacher(model, pixels_of(teacher_name), 64, torch.device("cpu"))
    said = teacher.say(images)
    values, indices = said["values"], said["indices"]
    assert values.shape == indices.shape == (2, 5, 2, 2)
    with torch.no_grad():
        features = model.forward_features(normalize(images, pixels_of(teacher_name)))
        features = features if features.shape[-1] == model.num_features else features.movedim(1, -1)
        expected = model.get_classifier()(features).log_softmax(-1).movedim(-1, 1)
    assert torch.allclose(values.float(), expected.gather(1, indices.long()), atol=4e-3)


def test_teacher_without_a_map_is_refused():
    model = timm.create_model("vit_tiny_patch16_224", num_classes=4, img_size=32, depth=1).eval()
    teacher = generate.Teacher(model, pixels_of("vit_tiny_patch16_224"), 32, torch.device("cpu"))
    assert "--teacher: its last features are no map" in complaint(
        teacher.say, torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    )


# -- features


def last_map(path, image):
    model = timm.create_model("debiformer_nano", num_classes=4, img_size=64, **KWARGS).eval()
    model.load_state_dict(torch.load(path)["model"])
    image = open_rgb(image).resize((64, 64), Image.Resampling.BICUBIC)
    with torch.no_grad():
        return model.forward_features(normalize(pil_to_tensor(image)[None], pixels_of("debiformer_nano")))


def test_features_are_the_teachers_to_a_step_of_their_bytes(make, image_folder, teacher):
    folder = make("--features", "64", "--input_size", "64")
    maps, source = opened(folder, image_folder), open_folder(str(image_folder), "train")
    for number in (0, 19, 20, 47):
        found = maps.read(number, name_in(source, str(image_folder), number))
        assert found["features"].shape == (64, 2, 2)
        assert found["features"].dtype == torch.int8
        assert found["values"].shape == (4, 2, 2)
        expected = last_map(teacher, source[number][0])
        error = maps.basis.decode(found["features"][None]) - expected
        assert error.square().mean() < 1e-3 * (expected - maps.basis.mean[:, None, None]).square().mean()


def test_components_hold_the_share_of_the_variance_that_is_told(make, image_folder, teacher, capsys):
    folder = make("--features", "8", "--no_labels", "--input_size", "64")
    told = float(capsys.readouterr().out.partition("8 components hold ")[2].partition("%")[0]) / 100
    maps, source = opened(folder, image_folder), open_folder(str(image_folder), "train")
    lost = total = 0.0
    for number in range(48):
        found = maps.read(number, name_in(source, str(image_folder), number))
        assert list(found) == ["features"]
        expected = last_map(teacher, source[number][0])
        lost += (maps.basis.decode(found["features"][None]) - expected).square().sum()
        total += (expected - maps.basis.mean[:, None, None]).square().sum()
    assert 0.2 < told < 0.999
    assert abs(1 - lost / total - told) < 3e-3


def test_vision_transformers_say_features(make, image_folder):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=4, img_size=32, depth=1)
    path = image_folder / "vit.pth"
    torch.save({"model": model.state_dict(), "args": {"input_size": 32, "model_kwargs": {"depth": 1}}}, path)
    argv = ["--teacher", "vit_tiny_patch16_224", "--teacher_path", str(path), "--features", "12", "--no_labels"]
    maps = opened(make(*argv), image_folder)
    assert maps.read(0, "train/cat/0.png")["features"].shape == (12, 2, 2)
    assert maps.basis.width == 192


def test_processes_share_the_main_ones_basis(make):
    argv = ("--features", "8", "--input_size", "64")
    whole = contents(make(*argv))
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(make, *argv, info=DistInfo(1, 2), output="shared")
        folder = make(*argv, info=DistInfo(0, 2), output="shared")
        waiting.result()
    make(*argv, output="shared")
    assert contents(folder) == whole


def test_features_of_another_basis_are_not_mixed_with_the_first(make, image_folder):
    folder = make("--features", "8", "--input_size", "64")
    for argv in (("--features", "9", "--input_size", "64"), ("--features", "8"), ("--input_size", "64")):
        assert "choose another --output" in complaint(make, *argv)
    labels = make("--input_size", "64", output="labels")
    argv = ("--features", "8", "--input_size", "64", "--output", str(labels))
    assert "choose another --output" in complaint(make, *argv)
    (folder / BASIS).write_bytes((folder / BASIS).read_bytes()[:-1] + b"x")
    assert f"{BASIS} is missing or damaged" in refused(folder, image_folder)
    (folder / BASIS).write_bytes(b"")
    assert f"{BASIS} is missing or damaged" in complaint(make, "--features", "8", "--input_size", "64")


def test_more_components_than_channels_are_refused(make):
    assert "--features 65: the teacher's features have 64" in complaint(make, "--features", "65")


# -- bad input


def test_missing_or_torn_shard_is_named(make, image_folder):
    folder = make()
    path = folder / "shard-00001.safetensors"
    content = path.read_bytes()
    for damage in (content[:-3], content[:-1] + b"x", None):
        path.unlink()
        if damage is not None:
            path.write_bytes(damage)
        assert "shard-00001.safetensors is missing or damaged, the first of 1 of 3" in refused(folder, image_folder)
        path.write_bytes(content)


def test_images_without_a_map_are_counted(make, image_folder):
    folder = make()
    for name in ("new_1.png", "new_2.png"):
        shutil.copy(image_folder / "train/owl/0.png", image_folder / "train/owl" / name)
    assert "no map of train/owl/new_1.png, the first of 2 of 50 images" in refused(folder, image_folder)


def test_maps_of_more_or_other_images_are_refused(make, image_folder):
    folder = make()
    (image_folder / "train/dog/0.png").rename(image_folder / "train/owl/extra.png")
    assert "no map of train/owl/extra.png, the first of 1 of 48" in refused(folder, image_folder)
    (image_folder / "train/owl/extra.png").unlink()
    message = refused(folder, image_folder)
    assert "train/dog/0.png stands there in place of train/dog/1.png, the first of 36" in message


def test_other_classes_are_refused(make, image_folder):
    folder = make()
    assert "is of 4 classes, the data has 5" in refused(folder, image_folder, num_classes=5)
    swapped = ["cat", "owl", "dog", "pig"]
    assert "in another order: dog stands there for owl, the first of 2" in refused(
        folder, image_folder, classes=swapped
    )
    assert "others" in refused(folder, image_folder, classes=["cat", "dog", "owl", "rat"])


def test_no_maps_and_a_damaged_index_are_told(make, image_folder, tmp_path):
    assert "holds no complete maps" in refused(tmp_path / "none", image_folder)
    (tmp_path / "maps").mkdir()
    fields = {"teacher": "", "names": "", "classes": [], "num_classes": 4, "grid": [1, 1], "side": 32, "shards": []}
    for text in ("{", "[1]", '{"images": 3}', json.dumps({**fields, "images": 1, "shard_size": 1})):
        (tmp_path / "maps" / INDEX).write_text(text)
        assert "is damaged" in refused(tmp_path / "maps", image_folder)


def test_teacher_of_other_classes_is_refused(make, image_folder, teacher, tmp_path):
    content = torch.load(teacher)
    torch.save({**content, "classes": ["cat", "dog", "pig", "owl"]}, tmp_path / "other.pth")
    assert "was trained on other classes" in complaint(make, "--teacher_path", str(tmp_path / "other.pth"))
    options = generate.parse(["--teacher", "resnet10t", "--output", "unused"])
    names = [f"class {number}" for number in range(1000)]  # as many as ImageNet's
    assert "was trained on other classes" in complaint(generate.build_teacher, options, names, torch.device("cpu"))
    assert "unknown --teacher 'resnet10x'; did you mean" in complaint(make, "--teacher", "resnet10x")
    assert "--input_size 60 is no multiple of 32" in complaint(make, "--input_size", "60")


def test_command_line_that_makes_nothing_is_refused(capsys):
    nothing = ["--teacher", "a", "--output", "b", "--no_labels"]
    for argv, words in ((["--output", "maps"], "--teacher is missing"), (nothing, "leaves nothing to store")):
        with pytest.raises(SystemExit):
            generate.parse(argv)
        assert words in capsys.readouterr().err


# -- as the authors published them


@pytest.fixture
def published(image_folder, tmp_path):
    generator = torch.Generator().manual_seed(0)
    for path in sorted((image_folder / "train").glob("*/*.png")):
        logits = torch.randn(5, 18, 18, generator=generator)
        numbers = torch.randint(0, 4, (5, 18, 18), generator=generator)
        target = tmp_path / "published" / path.parent.name / f"{path.stem}.pt"
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.save(torch.stack([logits, numbers]).half(), target)
    return tmp_path / "published"


def test_published_maps_are_read(published, image_folder):
    maps = opened(published, image_folder)
    found, content = maps.read(3, "train/cat/3.png"), torch.load(published / "cat/3.pt")
    assert torch.equal(found["values"], content[0])
    assert torch.equal(found["indices"], content[1].int())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (torch.zeros(2, 5, 9, 9), "others are"),
        (torch.full((2, 5, 18, 18), 4.0), "other classes than the data's 4"),
        (torch.full((2, 5, 18, 18), torch.nan), "or damaged"),
        ({"a": 1}, "not a tensor"),
        (print, "cannot be read"),
    ],
)
def test_damaged_published_maps_are_named(published, image_folder, content, words):
    maps = opened(published, image_folder)
    torch.save(content, published / "owl/2.pt")
    message = complaint(maps.read, 26, "train/owl/2.png")
    assert words in message
    assert "owl/2.pt" in message


def test_missing_published_maps_are_counted(published, image_folder):
    (published / "owl/2.pt").unlink()
    shutil.rmtree(published / "pig")
    assert "no map of train/owl/2.png, the first of 13 of 48 images" in refused(published, image_folder)
