"""LoRA fine-tuning on the device: `trainer.train` is the way in; the other modules are its parts."""
