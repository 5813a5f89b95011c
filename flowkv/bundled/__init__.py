"""The model that ships with FlowKV, so that everything runs with no download. `training/train.py` makes it."""

from pathlib import Path

MODEL_NAME = "flowkv-tiny"
MODEL_FOLDER = Path(__file__).parent / "model"
