(on request_headers
  (call $say @missing@ (call $get_header_map_value #0 @x-missing@ OUT))
  #0)
