"""The command line: ``main`` holds the app, every command has a module of its own."""
