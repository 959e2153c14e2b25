"""Deployed policies: the same chunks from folded weights and compiled programs.

``fold`` does the algebra that needs no compiler, ``programs`` cuts a policy's networks into functions of tensors, ``plan``
lists those that compute policies call, ``aoti`` and ``openvino`` compile and load them, ``store`` keeps them on this machine,
``deployed`` is the model that calls them, and ``deploy`` puts all of it together. Nothing is compiled but by ``deploy.build``.
"""
