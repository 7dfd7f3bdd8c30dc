"""Files that models come in: read as strangers', written as one's own.

Configs, weights in every form that Hugging Face has had, the hub, and the folder that
convert.py leaves. No model is made here, nothing is decoded.

In the order to read them: ``config`` (what config.json says of a T5), ``converted``
(the converted folder and its npz), ``reading`` (its tensors, or a part of each),
``archive`` (zip archives, mapped), ``sources`` (safetensors), ``torch_file`` and
``torch_pickle`` (PyTorch's files without PyTorch), ``hub`` (fetching), ``storing`` (the
weights written), ``replacing`` (a folder replaced whole), ``defaults`` (the rules for
generating that a checkpoint brings).
"""
