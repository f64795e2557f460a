"""Object detection: Mask R-CNN, RetinaNet and transformers' detectors on COCO or any images with such annotations."""
