"""A Hugging Face model folder, read as it is written.

config.json comes in two spellings (transformers 4 and 5), and a reader that knows only one fills in its own defaults without
a word. So :mod:`.facts` reads everything in it that decides what the model computes, and refuses what it does not know;
:mod:`.weights` reads the tensors; :mod:`.loading` makes transformers' objects from both and checks that they became what the
files say; :mod:`.portable` rewrites the two configs so that transformers 4 and 5 and vllm read them alike. Converters,
evaluation, serving and rollouts open a folder here and nowhere else.
"""
