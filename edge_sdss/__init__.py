"""Learn from the user of a device, on the device: select, synthesise, tune, gate, serve."""

__version__ = "0.1.0"
