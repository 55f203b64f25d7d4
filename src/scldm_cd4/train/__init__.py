"""Training of the two stages: the only place that imports Lightning, which takes as long to import as torch.

`runner` is the way in; it is imported where a training begins, so that models load and generate without it.
"""
