"""Distribution: the one door to Horovod, and one file per way of fusing the results of the ranks."""
