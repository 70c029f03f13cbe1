"""`otil-xdit`: tools around the plugin. Each tool is a module with `SUMMARY`, `add_arguments` and `run`."""
