"""What each verb of the command line does: read the options, call the public function, show the receipt."""
