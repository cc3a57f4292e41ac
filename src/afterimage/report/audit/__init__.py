"""What an audit found: verdict, page, figures."""
