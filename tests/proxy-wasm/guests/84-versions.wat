(on request_headers
  (drop (call $get_property @plugin_root_id@ OUT))
  (call $say @request@ (call $add_header_map_value #0 @x-version@ (i32.load #0) (i32.load #4)))
  #0)
(on response_headers
  (drop (call $get_property @plugin_root_id@ OUT))
  (call $say @response@ (call $add_header_map_value #2 @x-version@ (i32.load #0) (i32.load #4)))
  #0)
