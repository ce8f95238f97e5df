"""Copies of a gguf file that differ in what a test is about."""

import gguf
import numpy


def rewrite(source, target, rename=str, change=lambda name, data, kind: (data, kind), architecture="any"):
    """Copy a gguf file tensor by tensor."""
    writer = gguf.GGUFWriter(target, architecture)
    for tensor in gguf.GGUFReader(source).tensors:
        found = change(tensor.name, numpy.array(tensor.data), tensor.tensor_type)
        if found is not None:
            writer.add_tensor(rename(tensor.name), found[0], raw_dtype=found[1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
