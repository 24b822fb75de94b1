"""Evaluation: how good samples are, stated so that it can be stated again.

`features` (images to vectors), with FID's network in `inception`; `moments` (their mean and covariance); `statistics`
(all that metrics need, from one pass); `distances` (Frechet and kernel); `scores` (Inception Score, precision, recall,
density, coverage); `agreement` (does a sample show the class asked for); `protocol` (what is compared with what: start
here); `references` (real images' statistics on disk); and `records` (the one schema of results, free of PyTorch). Names
are imported from these modules, not from here.
"""
