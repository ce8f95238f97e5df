"""Copies of a gguf file that differ in what a test is about."""

import gguf
import numpy


def rewrite(
    source,
    target,
    rename=str,
    change=lambda name, data, kind: (data, kind),
    architecture="any",
    shapes=(),
    more=(),
    parts=0,
):
    """Copy a gguf file tensor by tensor; with shapes in the metadata, more tensors, or as if it were one of parts."""
    writer = gguf.GGUFWriter(target, architecture)
    for name, shape in dict(shapes).items():
        writer.add_array(f"comfy.gguf.orig_shape.{name}", shape)
    if parts:
        writer.add_uint16("split.count", parts)
    for tensor in gguf.GGUFReader(source).tensors:
        found = change(tensor.name, numpy.array(tensor.data), tensor.tensor_type)
        if found is not None:
            writer.add_tensor(rename(tensor.name), found[0], raw_dtype=found[1])
    for name, data in dict(more).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
