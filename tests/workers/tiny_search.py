"""The settings of a tiny search: HyTra at a sixteenth of its width on the embedded images."""

TINY = [
    "space.width=0.0625",
    "space.image_size=32",
    "heads.hidden=16",
    "heads.out=8",
    "data.workers=0",
    "train.batch=16",
    "train.micro_batch=8",
    "train.epochs=2",
    "train.steps_per_epoch=2",
    "train.lr=0.5",
    "data.val_images=24",
    "rating.batch=16",
    "rating.calibration_images=16",
    "rating.every_epochs=1",
    "checkpoint.every_steps=2",
]
