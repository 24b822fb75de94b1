"""Evaluation: how good samples are, stated so that it can be stated again.

`features` (images to vectors), `moments` (their mean and covariance, in memory and on disk), `distances` (Frechet and
kernel), `agreement` (does a sample show the class asked for), `protocol` (what is compared with what: start here), and
`records` (the one schema of results, free of PyTorch). Names are imported from these modules, not from here.
"""
