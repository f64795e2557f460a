"""Semantic segmentation: Semantic FPN and UPerNet on ADE20K or any folder of images and index PNGs."""
