"""Arrays to bytes and back, bounded and checked. Nothing that a file declares is believed.

* `archive`: the zip container of an npz, its seal and its limits;
* `npy`: the header and the elements of one array;
* `npz`: named arrays with a table of contents, as one file;
* `safetensors`: the same in that format.
"""
