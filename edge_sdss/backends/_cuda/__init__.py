"""What the CUDA backend stands on, bottom up.

    launches.py  each kernel's file, arguments and grid: the host's half of the ABI
    images.py    which compiled image fits this device and driver, or compile one
    gpu.py       the device: context, stream, memory, launching

Nothing here imports PyCUDA before a device is opened.
"""
