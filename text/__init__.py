"""Text to token ids and back.

Tokenizers as folders have them, conversations, and the processes that strangers'
programs are confined to. Nothing here knows a model.

In the order to read them: ``tokenizer`` (a folder's tokenizer, text that streams in
whole characters), ``fast_tokenizer`` (tokenizer.json), ``spiece_tokenizer`` (a bare
spiece.model), ``slow_tokenizer`` (others, and chat templates), ``tokenizer_files``
(special tokens, as files have named them), ``confined`` (a process with limits),
``messages`` (conversations), ``saving`` (the tokenizer of a conversion).
"""
