"""What each command of the command line does; lecture26/__main__.py declares their options."""
