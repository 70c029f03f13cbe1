"""Nodes for ComfyUI that have their images made by a server of `xfuser serve`, on all of its cards.

Link or copy this folder into ComfyUI's ``custom_nodes``, under any name. It needs numpy, Pillow and torch,
which ComfyUI has.
A server's key is read from the variable ``XFUSER_SERVE_API_KEY``, as workflows are written into image files.
"""

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
