"""Models that are larger than memory: read, averaged and written piece by piece.

* `stored_array`: one array in a file, read in runs of elements;
* `allowance`: what files that are read together may use together;
* `model_file`: a model in a file of any format, visited run by run;
* `model_writer`: a model written in the order of its elements;
* `passes`: a model worked through in as many elements as memory has exact sums for;
* `aggregation`: the weighted mean of models in files.
"""
