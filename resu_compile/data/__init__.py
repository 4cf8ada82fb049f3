"""Tables that ship with the package: times of the linear kernels by device."""
