"""`otil-xdit`: tools around the plugin. Each is a module with `add_arguments` and `run`."""
