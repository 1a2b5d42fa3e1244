"""The border to llama.cpp and ggml: the only place (with ``tier.py``) that touches ctypes.

``libs``     load the bindings and the native plug-in, once
``log``      llama.cpp's messages, and what they say about a failure
``devices``  ggml devices: backend modules, remote servers, names, buffer types
``params``   a ``Plan`` in llama.cpp's parameter structures, and the seam that gives them to ``llama_cpp.Llama``
``memory``   what a loaded context has allocated
``probe``    a process that answers memory questions without allocating
"""
