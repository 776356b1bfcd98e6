(on request_headers
  (call $say @foreign@ (call $set_effective_context #2))
  (call $show @foreign header@ (call $get_header_map_value #0 @x-foo@ OUT))
  #0)
