"""The cluster: rank grid, collectives, tensor and pipeline parallelism, and the engines that reduce gradients."""
