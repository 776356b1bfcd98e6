(on configure
  (call $say @configuration@ (call $set #7 #0 #0 @x@))
  (call $show @still@ (call $get_buffer_bytes #7 #0 #100 OUT))
  #1)
(on request_headers
  (call $say @set configuration@ (call $set #7 #0 #0 @x@))
  (call $say @set 9@ (call $set #9 #0 #0 @x@))
  (call $say @get 9@ (call $get_buffer_bytes #9 #0 #10 OUT))
  (call $say @get configuration@ (call $get_buffer_bytes #7 #0 #10 OUT))
  #0)
