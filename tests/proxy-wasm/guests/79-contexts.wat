(on request_headers
  (call $say @unknown@ (call $set_effective_context #9999))
  (call $say @root@ (call $set_effective_context #1))
  (call $say @headers from root@ (call $get_header_map_value #0 @x-foo@ OUT))
  #0)
(on response_headers
  (call $show @reset@ (call $get_header_map_value #2 @x-up@ OUT))
  #0)
