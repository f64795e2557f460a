"""Small runs of segmentation and detection."""

SMALL = [
    *("--model", "debiformer_nano", "--input_size", "32", "--batch_size", "2", "--epochs", "2", "--no_model_ema"),
    *("--model_kwargs", "embed_dims=16,32,48,64", "depths=1,1,1,1", "--num_workers", "0", "--device", "cpu"),
    *("--warmup_epochs", "0", "--lr", "0.1", "--min_lr", "0", "--longest", "128", "--shortest", "32"),
]
HEADS = {
    "semantic_fpn": ["--task", "segmentation", "--crop", "32", "--head_channels", "16"],
    "upernet": ["--task", "segmentation", "--crop", "32", "--head_channels", "16"],
    "retinanet": ["--task", "detection"],
    "mask_rcnn": ["--task", "detection"],
    "rtdetrv2": ["--task", "detection"],
}
