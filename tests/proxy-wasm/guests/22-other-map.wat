(on request_headers
  (call $show @response pairs@ (call $get_header_map_pairs #2 OUT))
  (call $show @response trailers@ (call $get_header_map_pairs #3 OUT))
  (call $show @response value@ (call $get_header_map_value #2 @x@ OUT))
  (call $say @no such map@ (call $get_header_map_pairs #8 OUT))
  #0)
