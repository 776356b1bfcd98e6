(global $id (mut i32) #0)
(on request_headers
  (global.set $id (local.get $id))
  (call $say @call@ (call $http_call @auth@ %:method=POST;:path=/check;:authority=somewhere;x-ask=1% @question@ #0 #0 #1000 #8))
  #1)
(on http_call_response
  (call $two @sizes@ (local.get $size) (local.get $trailers))
  (call $show @:status@ (call $get_header_map_value #6 @:status@ OUT))
  (call $show @x-reply@ (call $get_header_map_value #6 @x-reply@ OUT))
  (call $show @body@ (call $get_buffer_bytes #4 #0 #100 OUT))
  (call $show @x-sum@ (call $get_header_map_value #7 @x-sum@ OUT))
  (drop (call $set_effective_context (global.get $id)))
  (call $say @resume@ (call $continue_stream #0)))
(on response_headers
  (call $show @body later@ (call $get_buffer_bytes #4 #0 #100 OUT))
  (call $show @:status later@ (call $get_header_map_value #6 @:status@ OUT))
  #0)
